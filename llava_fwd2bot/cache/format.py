"""What a cache is made of: its settings, the columns of its tables, its locks, and the errors of its engine.

Three LanceDB tables lie in one folder or bucket:

    summaries   by content: the SHA-256 of a file's bytes. Rows are added and removed, never rewritten.
    files       by place: the whole path → SHA-256, status, size, time, EXIF, and columns that users add.
    commits     one row per commit: the versions and rows of the other two, so that a lost manifest shows.

All summaries of a cache have the same settings (the model, k, the codec, how files are read). They
are kept in the metadata of each table's schema, and another setting is refused.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..extras import require
from ..files.pixels import Reading
from ..version import __version__

FORMAT = 2  # of the tables; a later one is refused, an earlier one is read by legacy.py
SUMMARIES, FILES, COMMITS, SETTINGS = "summaries", "files", "commits", b"llava_fwd2bot"
TABLES = (SUMMARIES, FILES, COMMITS)  # in the order of their creation: with the last one it is a cache
OLD_TABLES = ("images", "skipped")  # of format 1
RESTORING = "restoring"  # the commit that is recorded before files are restored; "restore" is recorded after
PATIENCE = 5.0  # seconds that a writer waits for another one in silence


class DamagedCache(ValueError):
    """A part of the cache cannot be read, or is not what was written."""


def lancedb_module() -> Any:
    """LanceDB, and what else a cache needs; ImportError names the extra."""
    for name in ("pyarrow", "filelock"):
        require(name, "cache", "A cache")
    return require("lancedb", "cache", "A cache")


@dataclass(frozen=True)
class CacheSettings:
    """What all summaries of a cache share.

    Args:
        fingerprint: of the model, see summary_file.fingerprint_of.
        k, size: shape of a summary, [k, D].
        quantised: "4bit", "8bit" or "", the language model when it compressed.
        exif_orientation: "on" or "off": whether files are turned as their EXIF says.
        transparency: "white", or "hidden": the colours that a file has where it is transparent.
        decoding: "full", or "fast": large JPEGs are decoded at a smaller scale.
    """

    fingerprint: str
    k: int
    size: int
    codec: str
    pooling: str
    model: str = ""
    quantised: str = ""
    exif_orientation: str = "off"
    transparency: str = "hidden"
    decoding: str = "full"
    version: str = __version__
    format: int = FORMAT

    @property
    def reading(self) -> Reading:
        """How files become the pictures of this cache."""
        return Reading(self.exif_orientation == "on", self.transparency == "white")

    def differs(self, other: CacheSettings) -> str | None:
        """The name of the first setting that makes summaries differ; None where they can stand in one cache."""
        for field in fields(self):
            if field.name in ("model", "version", "format"):
                continue
            if getattr(self, field.name) != getattr(other, field.name):
                return field.name
        return None


def blocks(k: int) -> list[tuple[int, int]]:
    """The tokens of each column: [0, 1), [1, 2), [2, 4), [4, 8), … up to k."""
    edges = [0, 1]
    while edges[-1] < k:
        edges.append(min(2 * edges[-1], k))
    return list(zip(edges, edges[1:], strict=False))


def column(block: tuple[int, int]) -> str:
    return f"tokens_{block[0]}_{block[1]}"


def quoted(value: str) -> str:
    """An SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def one_of(name: str, values: Sequence[str]) -> str:
    return f"{name} IN ({', '.join(map(quoted, values))})" if len(values) else "false"


# ---------------------------------------------------------------------- errors
def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def of_engine(error: BaseException) -> bool:
    """Whether LanceDB raised it; a panic of its Rust code is no Exception."""
    return isinstance(error, (ValueError, RuntimeError, OSError)) or type(error).__name__ == "PanicException"


@contextmanager
def guarded(path: str) -> Iterator[None]:
    """DamagedCache for whatever LanceDB raises within."""
    try:
        yield
    except DamagedCache:
        raise
    except BaseException as error:
        if not of_engine(error):
            raise
        reason = f"{path} cannot be read ({first_line(error)}): is a file of it missing or cut?"
        raise DamagedCache(f"{reason} `fwd2bot cache verify {path}` says more, `repair` mends it.") from error


# ---------------------------------------------------------------------- places
def is_local(path: str) -> bool:
    """Whether it is a folder of this machine; else a bucket, s3://…"""
    return "://" not in path


def tables_of(path: str) -> set[str]:
    """The tables that are there; a table is once it has a manifest."""
    if not is_local(path):
        return set(lancedb_module().connect(path).list_tables().tables)
    found = (entry.parent.name.removesuffix(".lance") for entry in Path(path).glob("*.lance/_versions"))
    return {name for name in found if any((Path(path) / f"{name}.lance" / "_versions").glob("*.manifest"))}


def is_cache(path: str) -> bool:
    there = tables_of(path)
    return there.issuperset(TABLES) or there.issuperset(OLD_TABLES)


def clear_unfinished(path: str) -> None:
    """Removes tables of a `create` that was killed, which are empty.

    Raises:
        ValueError: anything else is in the folder.
        DamagedCache: the tables have rows: they are of a cache that has lost one of its three.
    """
    if not is_local(path):
        return
    tables = [Path(path) / f"{name}.lance" for name in (*TABLES, *OLD_TABLES)]
    inside = [entry.name for entry in Path(path).iterdir() if not (entry in tables or entry.name.startswith("."))]
    if inside:
        (Path(path) / ".lock").unlink(missing_ok=True)
        raise ValueError(f"{path} is a folder with other things in it ({inside[0]}, …): name a new one by --cache.")
    if any(next((table / "data").glob("*"), None) for table in tables):
        raise DamagedCache(f"{path} has lost a table, or its newest version: run `fwd2bot cache repair {path}`.")
    for table in tables:
        shutil.rmtree(table, ignore_errors=True)


def writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission", str(folder))


@contextmanager
def lock(path: str, name: str = ".lock") -> Iterator[None]:
    """One writer at a time; the system frees it when its process ends, however it ends. Object storage has none."""
    if not is_local(path):
        yield
        return
    from filelock import FileLock, Timeout

    held = FileLock(Path(path) / name)
    try:
        held.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"fwd2bot: waiting for another process that writes {path}", file=sys.stderr)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def free(path: str, name: str) -> Any:
    """A lock that is held by nobody, or None; to be used by `with`."""
    if not is_local(path):
        return nullcontext()
    from filelock import FileLock, Timeout

    held = FileLock(Path(path) / name)
    try:
        return held.acquire(timeout=0)
    except Timeout:
        return None


def in_conflict(error: BaseException) -> bool:
    """Whether another writer's commit came between."""
    return "commit conflict" in str(error).lower() or "concurrent" in str(error).lower()


def again(run: Callable[[], Any], times: int = 20) -> Any:
    """`run`, once more where another writer's commit came between; LanceDB says so."""
    for attempt in range(times):
        try:
            return run()
        except (RuntimeError, OSError) as error:
            if attempt + 1 == times or not in_conflict(error):
                raise
            time.sleep(random.random() * 0.05 * 2 ** min(attempt, 5))
