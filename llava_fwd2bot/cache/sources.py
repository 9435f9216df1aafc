"""Files as a cache knows them: which it has as they are, which it has under another name, which cannot be used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..files.images import file_digest, irregular
from .format import one_of
from .reader import SummaryCache

CHUNK = 256  # images in one commit
FEW = 1000  # images that are asked for by name


@dataclass
class Filled:
    """What came of a run: images compressed, found under another name, known already; ids that were skipped."""

    compressed: int = 0
    renamed: int = 0
    known: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class SourceImage:
    """A file as it is now; `problem`: why it cannot be used at all."""

    id: str
    path: Path
    bytes: int
    modified: int  # ns
    source: str
    problem: str | None = None

    def about(self, sha256: str, size: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        own = {"source": self.source, "bytes": self.bytes, "modified": self.modified}
        return {**own, "sha256": sha256, "width": size[0], "height": size[1]}

    def skipped(self, reason: object) -> dict[str, Any]:
        return {"id": self.id, "reason": str(reason), **self.about("")}


def outdated(cache: SummaryCache, images: dict[str, Path], retry: bool, result: Filled, bar: tqdm) -> list[SourceImage]:
    """The images that the cache does not have as they are; the others are counted. Opens no file.

    A file goes by the id that the cache knows its path by, else by the one given here; where another file that is still
    there has that id (two folders with the same names), by its whole path.
    """
    seen = [stat_of(name, path) for name, path in images.items()]
    where = None
    if len(seen) <= FEW:  # do not read the whole cache for a few
        ids, sources = [i.id for i in seen], [i.source for i in seen]
        where = f"{one_of('id', [*ids, *sources])} OR {one_of('source', sources)}"
    rows = {row["id"]: row for row in cache.about(["id", "source", "bytes", "modified"], where)} if seen else {}
    by_source = {row["source"]: name for name, row in rows.items()}
    bad = {row["id"]: row for row in cache.skipped()}
    found, absent, moved = [], [], []
    for image in seen:
        image.id = by_source.get(image.source, image.id)
        row = rows.get(image.id)
        if row is not None and row["source"] != image.source and Path(row["source"]).exists():
            image.id = image.source
            row = rows.get(image.id)
        if image.problem is not None:
            absent.append(image.skipped(image.problem))
        elif same(row, image):
            result.known += 1
            if row["source"] != image.source:  # the folder has moved
                moved.append((image.id, image.id, image.about("")))
        elif not retry and same(bad.get(image.id), image):
            result.skipped.append(bad[image.id])
        else:
            found.append(image)
    for at in range(0, len(moved), CHUNK):
        cache.adopt(moved[at : at + CHUNK])
    fresh = [entry for entry in absent if bad.get(entry["id"], {}).get("reason") != entry["reason"]]
    cache.skip(fresh, broken=False)
    result.skipped += absent
    bar.update(result.known + len(result.skipped) - bar.n)
    return found


def stat_of(name: str, path: Path) -> SourceImage:
    source = str(path.absolute())
    try:
        source.encode()
    except UnicodeEncodeError:  # the cache keeps text
        spelled = [os.fsencode(part).decode("utf-8", "backslashreplace") for part in (name, source)]
        return SourceImage(spelled[0], path, 0, 0, spelled[1], f"{spelled[1]}: its name is not UTF-8; rename it")
    try:
        found = path.stat()
    except OSError as error:
        return SourceImage(name, path, 0, 0, source, f"{path}: {error.strerror}")
    kind = irregular(found.st_mode)  # to open it might wait for ever
    problem = f"{path}: is {kind}, not a regular file" if kind else None
    return SourceImage(name, path, found.st_size, found.st_mtime_ns, source, problem)


def same(row: dict[str, Any] | None, image: SourceImage) -> bool:
    return row is not None and (row["bytes"], row["modified"]) == (image.bytes, image.modified)


def found_again(
    cache: SummaryCache, images: Sequence[SourceImage], digests: dict[str, str], names: set[str]
) -> set[str]:
    """The ids of images whose content is there already, by the same id (a file that was touched) or by another.

    Args:
        names: the ids of this run, from which no summary is moved away.
    """
    where = one_of("sha256", sorted(set(digests.values()))) if digests else "false"
    by_content: dict[str, list[dict[str, Any]]] = {}
    for row in cache.about(["id", "source", "sha256"], where):
        by_content.setdefault(row["sha256"], []).append(row)
    changes, gone = [], []
    for image in images:
        others = by_content.get(digests[image.id], [])
        if not others:
            continue
        own = next((row for row in others if row["id"] == image.id), None)
        free = (row for row in others if row["id"] not in names and not Path(row["source"]).exists())
        moved = next((row for row in free if row["id"] not in gone), None) if own is None else None
        if moved is not None:
            gone.append(moved["id"])
        changes.append(((own or moved or others[0])["id"], image.id, image.about("")))
    cache.adopt(changes, gone)
    return {new for _, new, _ in changes}


def digest_of(path: Path) -> str | OSError:
    try:
        return file_digest(path)
    except OSError as error:
        return error


def fits(cache: SummaryCache, summary: Tensor) -> bool:
    """Whether the codec can keep it; what is not a number cannot be kept."""
    return bool(summary.abs().amax() <= cache.codec.largest)


def too_large(cache: SummaryCache, path: Path) -> str:
    return (
        f"{path}: its summary overflows; try --dtype float32, then --retry, or another --codec than {cache.codec.name}"
    )


def skip(
    cache: SummaryCache, result: Filled, absent: list[dict[str, Any]], broken: list[dict[str, Any]], bar: tqdm
) -> None:
    """Records files that could not be reached, and files that were read and are no use."""
    cache.skip(absent, broken=False)
    cache.skip(broken)
    for entry in [*absent, *broken]:
        result.skipped.append(entry)
        bar.write(f"fwd2bot: skipped {entry['reason']}", file=sys.stderr)
