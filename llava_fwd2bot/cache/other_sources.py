"""Images that are not local files: members of tar files, rows of tables and data sets, objects of buckets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..files.folders import reason_of
from ..files.images import extensions
from ..files.tar import compression, members
from ..files.text import is_utf8
from .entries import Entry, misnamed


def of_tar(path: str, left_out: Counter[str]) -> Iterator[Entry]:
    """The images of a tar file (WebDataset's shards are such), by their names in it; a member is read when needed."""
    known, packed = extensions(), compression(path) is not None
    for member in members(path):
        ending = os.path.splitext(member.name)[1].lower()
        if ending not in known:
            left_out[reason_of(None, ending)] += 1
            continue
        entry = Entry(path, member.name, member.size, member.modified)
        if not is_utf8(entry.source):
            entry = misnamed(path, member.name, entry.source)
        elif member.problem is not None:
            entry.problem = f"{entry.source}: {member.problem}"
        else:
            entry.read = _held(member.read()) if packed else member.read  # what is packed has no places
        yield entry


def _held(data: bytes | None) -> Any:
    return lambda: data


def of_parquet(path: str) -> Iterator[Entry]:
    """The images of a Parquet file: of its first column of {"bytes", "path"} or of binary, row by row."""
    import pyarrow.parquet as pq

    modified = os.stat(path).st_mtime_ns
    with pq.ParquetFile(path) as file:
        name = _image_column(file.schema_arrow, path)
        number = 0
        for batch in file.iter_batches(64, columns=[name]):
            for value in batch.column(0).to_pylist():
                data = value.get("bytes") if isinstance(value, dict) else value
                yield _of_row(path, number, data, modified)
                number += 1


def _image_column(schema: Any, path: str) -> str:
    import pyarrow as pa

    for field in schema:
        binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if binary or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0):
            return field.name
    raise ValueError(f"{path} has no column of images (binary, or a struct with `bytes`): {', '.join(schema.names)}")


def _of_row(root: str, number: int, data: bytes | None, modified: int) -> Entry:
    entry = Entry(root, f"{number:09d}", len(data or b""), modified, read=_held(data))
    if data is None:
        entry.problem = f"{entry.source}: the row holds no image"
    return entry


def of_dataset(name: str) -> Iterator[Entry]:
    """The images of a Hugging Face data set, "hf://name" or "hf://name:split", streamed."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} needs datasets: pip install datasets") from error
    place, _, split = name.removeprefix("hf://").partition(":")
    rows = datasets.load_dataset(place, split=split or "train", streaming=True)
    features = rows.features or {}
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:  # it may not say which one it is
        first = next(iter(rows), {})
        column = next((key for key, value in first.items() if _is_encoded(value)), None)
        if column is None:
            raise ValueError(f"{name} has no column of images: {', '.join(first or features)}")
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(rows):
        value = row[column] or {}
        if value.get("bytes") is None and value.get("path"):  # a folder or an archive of files, here or on the hub
            yield Entry(name, f"{number:09d}", read=_opened(value["path"]))
        else:
            yield _of_row(name, number, value.get("bytes"), 0)


def _is_encoded(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _opened(path: str) -> Any:
    def read() -> bytes:
        import fsspec  # datasets needs it

        with fsspec.open(path, "rb") as file:
            return file.read()

    return read


def of_url(name: str, left_out: Counter[str]) -> Iterator[Entry]:
    """The images below a URL that fsspec reads (s3://, gs://, https://, file://), folder by folder."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{name} needs fsspec: pip install fsspec, and s3fs or gcsfs") from error
    system, root = fsspec.core.url_to_fs(name)
    known = extensions()

    def entry(place: str, info: dict[str, Any], base: str) -> Entry:
        below = place[len(base.rstrip("/")) + 1 :]
        return Entry(
            system.unstrip_protocol(base),
            below,
            info.get("size") or 0,
            _time(info, system, place),
            read=lambda: system.cat_file(place),
        )

    if not system.isdir(root):
        try:
            info = system.info(root)
        except FileNotFoundError:
            base, _, own = system.unstrip_protocol(root).rpartition("/")
            yield Entry(base, own, problem=f"{name}: No such file or directory")
            return
        yield entry(root, info, root.rpartition("/")[0])
        return
    for _, _, files in system.walk(root, detail=True):
        for own in sorted(files):
            ending = os.path.splitext(own)[1].lower()
            if ending in known:
                yield entry(files[own]["name"], files[own], root)
            else:
                left_out[reason_of(None, ending)] += 1


def _time(info: dict[str, Any], system: Any, place: str) -> int:
    """When an object changed, ns; of what has no time, a number of its tag, which changes with it."""
    import zlib

    for key in ("LastModified", "mtime", "last_modified", "updated", "modified"):
        if (found := _nanoseconds(info.get(key))) is not None:
            return found
    if tag := info.get("ETag") or info.get("etag"):
        return zlib.crc32(str(tag).encode())
    try:
        found = _nanoseconds(system.modified(place))
    except NotImplementedError:
        found = None
    return found or _nanoseconds(info.get("created")) or 0


def _nanoseconds(value: Any) -> int | None:
    if hasattr(value, "timestamp"):
        value = value.timestamp()
    return int(value * 1e9) if isinstance(value, (int, float)) else None
