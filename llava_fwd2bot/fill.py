"""`fwd2bot compress --cache`: a collection of images into a cache; again and again, by one process or by many.

An image is known by its content: one that is there under another name is not compressed again, a changed one is. A
chunk of images is one commit and one claim: a process takes a chunk that no other has, so that several share the work.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .bottleneck import embed
from .cache import SummaryCache
from .cache_format import one_of
from .compress import ahead
from .images import DEFAULT_MAX_PIXELS, join_pixels, open_image, prepare_pixels

CHUNK = 256  # images in one commit
SETTLED = 2.0  # seconds that a file must lie unchanged before --watch takes it


@dataclass
class Filled:
    """What came of a run: images compressed, found under another name, known already; ids that were skipped."""

    compressed: int = 0
    renamed: int = 0
    known: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return self.compressed + self.renamed + self.known + len(self.skipped)


@dataclass
class SourceImage:
    """A file as it is now."""

    id: str
    path: Path
    bytes: int
    modified: int  # ns

    def about(self, sha256: str, size: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        own = {"source": str(self.path.absolute()), "bytes": self.bytes, "modified": self.modified}
        return {**own, "sha256": sha256, "width": size[0], "height": size[1]}

    def skipped(self, reason: object) -> dict[str, Any]:
        return {"id": self.id, "reason": str(reason), **self.about("")}


class Compressor:
    """Summaries of prepared images; a batch that does not fit into memory is halved, and stays halved."""

    def __init__(self, model: nn.Module, processor: Any, k: int, batch_size: int, max_pixels: int | None) -> None:
        self.model, self.processor, self.k, self.batch_size = model, processor, k, batch_size
        self.max_pixels = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
        self.words = model.get_input_embeddings().weight

    def prepare(self, path: Path) -> tuple[dict[str, Any], tuple[int, int]]:
        image = open_image(path, self.max_pixels)
        return prepare_pixels(self.processor, self.model, [image]), image.size

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """(summaries [M, k, D], embeddings [M, D])"""
        parts, at = [], 0
        while at < len(prepared):
            try:
                pixels = join_pixels(list(prepared[at : at + self.batch_size]), self.words)
                parts.append(self.model.compress(**pixels, num_tokens=self.k))
                at += self.batch_size
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                torch.cuda.empty_cache()
        summary = torch.cat(parts)
        return summary.cpu(), embed(summary, self.model.fwd2bot_config.pooling).cpu()


def fill(
    cache: SummaryCache,
    images: dict[str, Path],
    compressor: Compressor,
    *,
    retry: bool = False,
    chunk: int = CHUNK,
    workers: int | None = None,
    bar: tqdm | None = None,
) -> Filled:
    """Brings `cache` up to date with `images` ({id: path}); what is there and unchanged is not read.

    Args:
        retry: read files again that could not be used before and have not changed.

    Raises:
        OSError: the cache cannot be written; what was in it is unchanged.
    """
    started, result = time.perf_counter(), Filled()
    bar = tqdm(total=len(images), unit="image", desc="compress", file=sys.stderr) if bar is None else bar
    with bar:
        # by place in the whole list, so that processes that start at different times have the same chunks
        place = {name: i for i, name in enumerate(images)}
        chunks: list[list[SourceImage]] = [[] for _ in range(0, len(images), chunk)]
        for image in outdated(cache, images, retry, result, bar):
            chunks[place[image.id] // chunk].append(image)
        names = list(images)
        waiting = [place for place, part in enumerate(chunks) if part]
        while waiting:
            taken = []
            for place in waiting:
                with _claim(cache.path, names[place * chunk : (place + 1) * chunk]) as mine:
                    if mine:
                        _chunk(cache, chunks[place], compressor, result, workers, bar)
                        taken.append(place)
            waiting = [place for place in waiting if place not in taken]
            if waiting and not taken:  # all are being done by others: wait for what they leave undone
                time.sleep(0.2)
    result.seconds = time.perf_counter() - started
    return result


def outdated(cache: SummaryCache, images: dict[str, Path], retry: bool, result: Filled, bar: tqdm) -> list[SourceImage]:
    """The images that the cache does not have as they are; the others are counted. Reads no file."""
    rows = {row["id"]: row for row in cache.about(["id", "bytes", "modified"])}
    bad = {} if retry else {row["id"]: row for row in cache.skipped()}
    found = []
    for name, path in images.items():
        image = _stat(name, path)
        if isinstance(image, dict):
            skip(cache, result, [image], bar)
        elif _same(rows.get(name), image):
            result.known += 1
        elif _same(bad.get(name), image):
            result.skipped.append(bad[name])
        else:
            found.append(image)
    bar.update(result.known + len(result.skipped) - bar.n)
    return found


def _stat(name: str, path: Path) -> SourceImage | dict[str, Any]:
    try:
        found = path.stat()
    except OSError as error:
        return {"id": name, "reason": f"{path}: {error.strerror}", "source": str(path), "bytes": 0, "modified": 0}
    return SourceImage(name, path, found.st_size, found.st_mtime_ns)


def _same(row: dict[str, Any] | None, image: SourceImage) -> bool:
    return row is not None and (row["bytes"], row["modified"]) == (image.bytes, image.modified)


@contextmanager
def _claim(path: str, ids: Sequence[str]) -> Iterator[bool]:
    """Whether this process has the chunk to itself; the system gives it back when the process ends."""
    if "://" in path:
        yield True
        return
    from filelock import FileLock, Timeout

    name = hashlib.sha256("\0".join(ids).encode()).hexdigest()[:32]
    folder = Path(path) / ".claims"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        (folder / name).unlink(missing_ok=True)
        lock.release()


def _chunk(
    cache: SummaryCache,
    part: Sequence[SourceImage],
    compressor: Compressor,
    result: Filled,
    workers: int | None,
    bar: tqdm,
) -> None:
    """One claim: what others have done since is left alone, the rest is compressed and committed at once."""
    rows = {
        row["id"]: row for row in cache.about(["id", "bytes", "modified", "sha256"], one_of("id", [i.id for i in part]))
    }
    own = [image for image in part if not _same(rows.get(image.id), image)]
    result.known += len(part) - len(own)
    bar.update(len(part) - len(own))
    hashes = [future.result() for future in ahead(digest_of, [i.path for i in own], len(own) + 1, workers)]
    fresh: list[tuple[SourceImage, str]] = []
    for image, digest in zip(own, hashes, strict=True):
        if isinstance(digest, OSError):
            skip(cache, result, [image.skipped(f"{image.path}: {digest.strerror}")], bar)
        elif found_again(cache, image, digest, rows.get(image.id)):
            result.renamed += 1
            bar.update()
        else:
            fresh.append((image, digest))
    done: list[tuple[SourceImage, str, tuple[int, int]]] = []
    summaries, vectors, bad, batch = [], [], [], []

    def run() -> None:
        if batch:
            summary, vector = compressor([pixels for *_, pixels in batch])
            for (image, digest, size, _), s, v in zip(batch, summary, vector, strict=True):
                if torch.isfinite(s).all():
                    done.append((image, digest, size))
                    summaries.append(s)
                    vectors.append(v)
                else:
                    bad.append(image.skipped(f"{image.path}: its summary overflows; try --dtype bfloat16"))
            bar.update(len(batch))
            batch.clear()

    prepared = ahead(compressor.prepare, [i.path for i, _ in fresh], 2 * compressor.batch_size, workers)
    for (image, digest), future in zip(fresh, prepared, strict=True):
        try:
            pixels, size = future.result()
            batch.append((image, digest, size, pixels))
        except (ValueError, OSError) as error:
            bad.append(image.skipped(error))
            bar.update()
        if len(batch) >= compressor.batch_size:
            run()
    run()
    if done:
        about = [image.about(digest, size) for image, digest, size in done]
        cache.add([image.id for image, *_ in done], torch.stack(summaries), torch.stack(vectors), about)
    result.compressed += len(done)
    skip(cache, result, bad, None)
    for entry in bad:
        bar.write(f"fwd2bot: skipped {entry['reason']}", file=sys.stderr)


def skip(cache: SummaryCache, result: Filled, entries: list[dict[str, Any]], bar: tqdm | None) -> None:
    cache.skip(entries)
    result.skipped += entries
    if bar is not None:
        for entry in entries:
            bar.write(f"fwd2bot: skipped {entry['reason']}", file=sys.stderr)
        bar.update(len(entries))


def found_again(cache: SummaryCache, image: SourceImage, digest: str, row: dict[str, Any] | None = None) -> bool:
    """Whether the same content is there already: by the same id (a file that was touched), or by another."""
    if row is not None and row["sha256"] == digest:
        cache.rename(image.id, image.id, image.about(digest))
        return True
    others = cache.about(["id", "source"], f"sha256 = '{digest}'")
    for other in others:
        if row is None and not Path(other["source"]).exists():  # moved
            cache.rename(other["id"], image.id, image.about(digest))
            return True
    if others:
        cache.copy(others[0]["id"], image.id, image.about(digest))
    return bool(others)


def digest_of(path: Path) -> str | OSError:
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        return error


def watch(look: Callable[[], dict[str, Path]], again: Callable[[dict[str, Path]], Filled], every: float) -> None:
    """Calls `again` with what `look` finds, every so many seconds, until Ctrl-C; a file still being copied waits."""
    seen: dict[str, tuple[int, int]] = {}
    while True:
        now, fresh = time.time(), {}
        for name, path in look().items():
            image = _stat(name, path)
            if isinstance(image, SourceImage) and now - image.modified / 1e9 > SETTLED:
                if seen.get(name) != (image.bytes, image.modified):
                    fresh[name] = path
                    seen[name] = (image.bytes, image.modified)
        if fresh:
            again(fresh)
        time.sleep(every)
