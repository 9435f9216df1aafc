"""`fwd2bot compress --cache`: a collection of images into a cache; again and again, by one process or by many.

An image is known by its content: one that is there under another name is not compressed again, a changed one is. A
chunk of images is one commit and one claim: a process takes a chunk that no other has, so that several share the work.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .compressor import Compressor, Made, ahead
from .format import one_of
from .reader import SummaryCache
from .sources import CHUNK, Filled, SourceImage, digest_of, fits, found_again, outdated, same, skip, stat_of, too_large

TIDY, SAFE = 256, timedelta(hours=1)  # commits after which small files are joined; how old what is removed must be
SETTLED = 2.0  # seconds that a file must lie unchanged before --watch takes it


def fill(
    cache: SummaryCache,
    images: dict[str, Path],
    compressor: Compressor,
    *,
    retry: bool = False,
    chunk: int = CHUNK,
    workers: int | None = None,
) -> Filled:
    """Brings `cache` up to date with `images` ({id: path}); what is there and unchanged is not read.

    Args:
        retry: read files again that could not be used before and have not changed.

    Raises:
        OSError: the cache cannot be written; what is committed stays.
        ValueError: the compressor reads files otherwise than the cache's were read.
    """
    if compressor.reading != cache.settings.reading:
        raise ValueError(
            f"{cache.path} was made with {cache.settings.reading}, and the compressor reads with {compressor.reading}: "
            "make it with reading=cache.settings.reading."
        )
    started, result = time.perf_counter(), Filled()
    with tqdm(total=len(images), unit="image", desc="compress", file=sys.stderr) as bar:
        todo = outdated(cache, images, retry, result, bar)
        # by the id alone: processes whose lists differ a little have nearly the same chunks
        count = 1
        while count * chunk < len(images):
            count *= 2
        chunks: dict[int, list[SourceImage]] = {}
        for image in todo:
            chunks.setdefault(zlib.crc32(image.id.encode()) % count, []).append(image)
        waiting, commits, names = sorted(chunks), 0, {image.id for image in todo}
        while waiting:
            busy = []
            for number in waiting:
                with _claim(cache, f"{number}-of-{count}") as mine:
                    if mine:
                        _chunk(cache, chunks[number], names, compressor, result, workers, bar)
                        commits += 1
                    else:
                        busy.append(number)
                if commits and commits % TIDY == 0:
                    cache.optimize(SAFE)
            if len(busy) == len(waiting):  # all are being done by others: wait for what they leave undone
                time.sleep(0.2)
            waiting = busy
        if commits > 1:
            cache.optimize(SAFE)
    result.seconds = time.perf_counter() - started
    return result


@contextmanager
def _claim(cache: SummaryCache, name: str) -> Iterator[bool]:
    """Whether this process has the chunk to itself; the system gives it back when the process ends."""
    if not cache.local:
        yield True
        return
    from filelock import FileLock, Timeout

    folder = Path(cache.path) / ".claims"
    folder.mkdir(exist_ok=True)
    claim = FileLock(folder / name)
    try:
        claim.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        claim.release()


def _chunk(
    cache: SummaryCache,
    part: Sequence[SourceImage],
    names: set[str],
    compressor: Compressor,
    result: Filled,
    workers: int | None,
    bar: tqdm,
) -> None:
    """One claim: what others have done since is left alone, the rest is compressed and committed at once."""
    rows = {row["id"]: row for row in cache.about(["id", "bytes", "modified"], one_of("id", [i.id for i in part]))}
    own = [image for image in part if not same(rows.get(image.id), image)]
    result.known += len(part) - len(own)
    bar.update(len(part) - len(own))
    digests: dict[str, str] = {}
    absent, bad = [], []
    for image, future in zip(own, ahead(digest_of, [i.path for i in own], len(own) + 1, workers), strict=True):
        found = future.result()
        if isinstance(found, OSError):
            absent.append(image.skipped(f"{image.path}: {found.strerror}"))
        else:
            digests[image.id] = found
    here = [image for image in own if image.id in digests]
    again = found_again(cache, here, digests, names)
    result.renamed += len(again)
    bar.update(len(again))
    fresh = [image for image in here if image.id not in again]
    by_id = {image.id: image for image in fresh}
    done: dict[str, Made] = {}
    for name, made in compressor.each({image.id: image.path for image in fresh}, workers):
        if isinstance(made, Exception):
            bad.append(by_id[name].skipped(made))
        elif fits(cache, made[1]):
            done[name] = made
        else:
            bad.append(by_id[name].skipped(too_large(cache, by_id[name].path)))
        bar.update()
    if done:
        sizes, summaries, vectors = zip(*done.values(), strict=True)
        about = [by_id[name].about(digests[name], size) for name, size in zip(done, sizes, strict=True)]
        cache.add(list(done), torch.stack(summaries), torch.stack(vectors), about)
    result.compressed += len(done)
    skip(cache, result, absent, bad, bar)
    bar.update(len(absent))


def watch(look: Callable[[], dict[str, Path]], again: Callable[[dict[str, Path]], Filled], every: float) -> None:
    """Calls `again` with what `look` finds, every so many seconds, until Ctrl-C; a file still being copied waits."""
    seen: dict[str, tuple[int, int]] = {}
    while True:
        now, fresh = time.time(), {}
        for name, path in look().items():
            image = stat_of(name, path)
            state = (image.bytes, image.modified)
            if image.problem is None and abs(now - image.modified / 1e9) > SETTLED and seen.get(name) != state:
                fresh[name], seen[name] = path, state
        if fresh:
            try:
                again(fresh)
            except (ValueError, OSError) as error:  # a full disk, say: the next look tries again
                print(f"fwd2bot: {error}", file=sys.stderr)
                for name in fresh:
                    del seen[name]
        time.sleep(every)
