"""What a cache is made of: its settings, tables and columns, its checksum, its lock."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from ..files.images import Reading
from ..version import __version__

FORMAT = 1  # of the tables; a later one is refused
EXACT_BELOW = 100_000  # rows up to which a search compares with every row
REFINED = 20  # hits of the index at least, whose vectors are read to put them in order; or twice what is asked for
PROBES = 20  # partitions of the index that a search looks into: all of them up to 1.3 million images
IMAGES, SKIPPED, SETTINGS = "images", "skipped", b"llava_fwd2bot"
ABOUT = ("sha256", "source", "bytes", "modified", "width", "height", "added")
TOLD = ("id", *ABOUT[:-1])  # what the checksum of a row covers beside its numbers


def lancedb_module() -> Any:
    """LanceDB, and what else a cache needs; ImportError names the extra."""
    for name in ("pyarrow", "filelock"):
        require(name, "cache", "A cache")
    return require("lancedb", "cache", "A cache")


@dataclass(frozen=True)
class CacheSettings:
    """What all summaries of a cache share. `fingerprint`: of the model, see compress.fingerprint_of.

    `quantised`: "4bit", "8bit" or "", the language model when it compressed: what is added must be made alike.
    """

    fingerprint: str
    k: int
    size: int
    codec: str
    pooling: str
    model: str = ""
    quantised: str = ""
    exif_orientation: str = "off"  # on or off; caches that do not say it were made without
    transparency: str = "hidden"  # white, or hidden: the colours that a file has where it is transparent
    version: str = __version__
    format: int = FORMAT

    @property
    def reading(self) -> Reading:
        """How files become the pictures of this cache."""
        return Reading(self.exif_orientation == "on", self.transparency == "white")


def blocks(k: int) -> list[tuple[int, int]]:
    """The tokens of each column: [0, 1), [1, 2), [2, 4), [4, 8), … up to k."""
    edges = [0, 1]
    while edges[-1] < k:
        edges.append(min(2 * edges[-1], k))
    return list(zip(edges, edges[1:], strict=False))


def column(block: tuple[int, int]) -> str:
    return f"tokens_{block[0]}_{block[1]}"


def crc32(tokens: np.ndarray, vector: np.ndarray, told: Sequence[Any]) -> int:
    """Of a row: its encoded tokens [k, B]; its embedding [D] as float16, little endian; then TOLD's columns as UTF-8
    text, a zero byte between them."""
    start = zlib.crc32(vector.astype("<f2").tobytes(), zlib.crc32(np.ascontiguousarray(tokens)))
    return zlib.crc32("\0".join(map(str, told)).encode(), start)


def about_fields() -> list[tuple[str, Any]]:
    import pyarrow as pa

    kinds = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.int32(), pa.int32(), pa.timestamp("us", tz="UTC"))
    return list(zip(ABOUT, kinds, strict=True))


def skipped_schema() -> Any:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "reason", "source")]
    return pa.schema([*texts, ("bytes", pa.int64()), ("modified", pa.int64())])


def one_of(name: str, values: Sequence[str]) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{name} IN ({quoted})"


def asked(run: Any, where: str | None, table: Any) -> Any:
    try:
        return run()
    except (ValueError, RuntimeError, OSError) as error:
        if where is None:
            raise ValueError(
                f"The cache cannot be read ({first_line(error)}): is a file of it missing or cut?"
            ) from error
        columns = ", ".join(name for name in table.schema.names if name in ("id", *ABOUT))
        raise ValueError(f"The filter {where!r} does not work: {first_line(error)}. Columns: {columns}.") from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def is_local(path: str) -> bool:
    """Whether it is a folder of this machine; else a bucket, s3://…"""
    return "://" not in path


def is_cache(path: str) -> bool:
    """Whether both tables are there; a table is once it has a manifest."""
    if not is_local(path):
        return {IMAGES, SKIPPED} <= set(lancedb_module().connect(path).list_tables().tables)
    return all(any((Path(path) / f"{name}.lance" / "_versions").glob("*")) for name in (IMAGES, SKIPPED))


def clear_unfinished(path: str) -> None:
    """Removes tables of a `create` that was killed; ValueError where anything else is in the folder."""
    if is_local(path):
        tables = {f"{name}.lance" for name in (IMAGES, SKIPPED)}
        inside = [entry.name for entry in Path(path).iterdir() if entry.name not in (".lock", *tables)]
        if not inside:
            for name in tables:
                shutil.rmtree(Path(path) / name, ignore_errors=True)
        else:
            (Path(path) / ".lock").unlink(missing_ok=True)
            raise ValueError(f"{path} is a folder with other things in it ({inside[0]}, …): name a new one by --cache.")


def writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission", str(folder))


def lock(path: str) -> Any:
    """One writer at a time; the system frees it when its process ends, however it ends."""
    if not is_local(path):
        return nullcontext()
    from filelock import FileLock

    return FileLock(Path(path) / ".lock")
