"""Columns of a user's own in `files`: tags, captions, dates, from a CSV or Parquet file; and EXIF read again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .decode import exif_of, read_file
from .format import FILES, one_of
from .reader import SummaryCache
from .rows import with_checksum
from .tables import EXIF, OK, SYSTEM
from .writer import MANY

NAMING = ("source", "path", "file", "id")  # columns that may name the image


def import_metadata(cache: SummaryCache, path: str | os.PathLike) -> dict[str, Any]:
    """Adds the columns of a table to the files that its rows name, by id or by whole path.

    A column of NAMING names the image; every other one becomes a column of the cache, or fills that of the same name.

    Returns:
        {"updated": rows, "unknown": names that are not in the cache, "columns": names}

    Raises:
        ValueError: the table names no images, or a column is one of the cache's own, or was of another type.
    """
    import pyarrow as pa

    table = _table(Path(path))
    key = next((name for name in NAMING if name in table.schema.names), None)
    if key is None:
        raise ValueError(f"{path} names no images: one of its columns must be called {', '.join(NAMING)}.")
    names = [name for name in table.schema.names if name != key]
    schema = cache.table(FILES).schema
    kinds = {name: _kind(table.schema.field(name).type, name, path) for name in names}
    for name in names:
        if name in SYSTEM and name not in EXIF:
            raise ValueError(f"{path} has a column {name}, which the cache keeps itself: rename it.")
        if name in schema.names and schema.field(name).type != kinds[name] and name not in EXIF:
            raise ValueError(f"{path} has {name} as {kinds[name]}, the cache as {schema.field(name).type}.")
    if new := [pa.field(name, kinds[name]) for name in names if name not in schema.names]:
        with cache.writing():
            cache.table(FILES).add_columns(pa.schema(new))
    schema, updated, unknown = cache.table(FILES).schema, 0, []
    for batch in table.to_batches(MANY):
        rows = pa.Table.from_batches([batch])
        for name in names:
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, schema.field(name), rows[name].cast(schema.field(name).type))
        given = {str(row[key]): row for row in rows.to_pylist() if row[key] is not None}
        found = cache.rows(FILES, None, f"{one_of('id', list(given))} OR {one_of('source', list(given))}").to_pylist()
        known = {row["id"] for row in found} | {row["source"] for row in found}
        unknown += [name for name in given if name not in known]
        for row in found:
            own = given.get(row["source"]) or given[row["id"]]
            row.update({name: own[name] for name in names})
        if found:
            cache.put_files(with_checksum(pa.Table.from_pylist(found, schema=schema)), "import-metadata")
        updated += len(found)
    return {"updated": updated, "unknown": unknown, "columns": names}


def _table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            return pyarrow.parquet.read_table(path)
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        return pyarrow.csv.read_csv(io.BytesIO(text), parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def _kind(kind: Any, name: str, path: str | os.PathLike) -> Any:
    """The type that a column is kept in."""
    import pyarrow as pa

    types = pa.types
    if types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind):
        return pa.string()
    if types.is_boolean(kind):
        return pa.bool_()
    if types.is_integer(kind):
        return pa.int64()
    if types.is_floating(kind) or types.is_decimal(kind):
        return pa.float64()
    if types.is_timestamp(kind) or types.is_date(kind):
        return pa.string()  # 2024-12-31 23:59:59: a condition compares it with text
    raise ValueError(f"{path}: column {name} is of type {kind}, which is not kept; make it text.")


def read_exif(cache: SummaryCache) -> dict[str, Any]:
    """Reads time, camera and place from the files that are there; a cache of an earlier format has none of it."""
    import pyarrow as pa

    schema, updated = cache.table(FILES).schema, 0
    for rows in _without_exif(cache):
        found = []
        for row in rows:
            if exif := _exif(row["source"]):
                found.append({**row, **exif})
        if found:
            cache.put_files(with_checksum(pa.Table.from_pylist(found, schema=schema)), "import-metadata")
        updated += len(found)
    return {"updated": updated, "columns": list(EXIF)}


def _without_exif(cache: SummaryCache) -> Iterator[list[dict[str, Any]]]:
    for rows in cache.batches(FILES, size=MANY):
        yield [row for row in rows.to_pylist() if row["status"] == OK and all(row[name] is None for name in EXIF)]


def _exif(source: str) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_file(source))) as image:
            return exif_of(image)
    except (OSError, ValueError):  # it is not there, or is no image any more
        return {}
