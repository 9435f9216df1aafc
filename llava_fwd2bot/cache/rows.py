"""Rows of the tables as pyarrow tables: makes them with checksums, checks them, and takes tokens and vectors out.

Shapes: N rows, k summary tokens, D hidden size, B bytes of an encoded token.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from .checksum import OWN, checksums_of, sums_of
from .format import CacheSettings, blocks, column
from .tables import OK, files_schema, summaries_schema

if TYPE_CHECKING:
    from torch import Tensor


def summary_rows(
    settings: CacheSettings,
    keys: Sequence[str],
    sizes: Sequence[Sequence[int]],
    tokens: np.ndarray,
    vectors: np.ndarray,
) -> Any:
    """Rows of `summaries`.

    Args:
        keys: SHA-256 of the files' bytes. sizes: width and height of each image.
        tokens: encoded, uint8 [N, k, B]. vectors: of unit length, float16 [N, D].
    """
    import pyarrow as pa

    parts, schema = blocks(settings.k), summaries_schema(settings)
    columns: dict[str, Any] = {"sha256": pa.array(list(keys), pa.string())}
    for at, name in enumerate(("width", "height")):
        columns[name] = pa.array([int(size[at]) for size in sizes], pa.int32())
    columns["sums"] = _binary(sums_of(keys, sizes, vectors, tokens, parts).view(np.uint8))
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).ravel())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, settings.size)
    for first, last in parts:
        columns[column((first, last))] = _binary(tokens[:, first:last].reshape(len(keys), -1))
    return pa.table(columns, schema=schema)


def _binary(values: np.ndarray) -> Any:
    import pyarrow as pa

    values = np.ascontiguousarray(values)  # [N, bytes]
    kind = pa.binary(values.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def file_rows(settings: CacheSettings, entries: Sequence[dict[str, Any]], schema: Any = None) -> Any:
    """Rows of `files`; what an entry does not say is empty, but that `added` is now and `status` is OK.

    Args:
        schema: of the table, where users have added columns.
    """
    import pyarrow as pa

    schema = files_schema(settings) if schema is None else schema
    now, plain = datetime.now(timezone.utc), {"status": OK}
    rows = [{**plain, **entry, "added": entry.get("added") or now, "crc32": None} for entry in entries]
    return with_checksum(pa.Table.from_pylist(rows, schema=schema))


def with_checksum(rows: Any) -> Any:
    import pyarrow as pa

    at = rows.schema.get_field_index("crc32")
    return rows.set_column(at, rows.schema.field(at), pa.array(checksums_of(rows), pa.int64()))


def tokens_in(settings: CacheSettings, rows: Any, parts: Sequence[tuple[int, int]]) -> np.ndarray:
    """The encoded tokens of some blocks, uint8 [N, tokens, B]."""
    found = []
    for part in parts:
        token = rows.schema.field(column(part)).type.byte_width // (part[1] - part[0])
        flat = np.frombuffer(b"".join(rows[column(part)].to_pylist()), np.uint8)
        found.append(flat.reshape(rows.num_rows, -1, token))
    return np.concatenate(found, axis=1) if found else np.empty((rows.num_rows, 0, 1), np.uint8)


def vectors_in(rows: Any) -> np.ndarray:
    """float16 [N, D]"""
    return rows["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)


def wrong_summaries(settings: CacheSettings, rows: Any, parts: Sequence[tuple[int, int]], own: bool = True) -> Any:
    """Which rows are not as they were written, bool [N]: their tokens of `parts`, and with `own` vector and size.

    Args:
        rows: with `sha256`, `sums` and the columns of `parts`; with `own` also `width`, `height`, `embedding`.
    """
    count, every = rows.num_rows, blocks(settings.k)
    keys = rows["sha256"].to_pylist()
    written = np.frombuffer(b"".join(rows["sums"].to_pylist()), "<u4").reshape(count, OWN + len(every))
    tokens = tokens_in(settings, rows, parts)
    if own:
        sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
        vectors = vectors_in(rows)
    else:
        sizes, vectors = [(0, 0)] * count, np.empty((count, 0), np.float16)
    found = sums_of(keys, sizes, vectors, tokens, parts)
    start = 0 if own else OWN
    return (found[:, start:] != written[:, start : OWN + len(parts)]).any(1)


def wrong_vectors(rows: Any) -> np.ndarray:
    """Which vectors and sizes are not as they were written, bool [N]; of rows with `sha256`, sizes, sums, vectors."""
    written = np.frombuffer(b"".join(rows["sums"].to_pylist()), "<u4").reshape(rows.num_rows, -1)
    sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
    nothing = np.empty((rows.num_rows, 0, 1), np.uint8)
    found = sums_of(rows["sha256"].to_pylist(), sizes, vectors_in(rows), nothing, ())
    return (found != written[:, :OWN]).any(1)


def wrong_files(rows: Any) -> Any:
    """Which rows of `files` (all columns) are not as they were written, bool [N]."""
    return checksums_of(rows) != np.array(rows["crc32"].to_pylist(), np.float64)  # a damaged row may have no number


def decoded(settings: CacheSettings, tokens: np.ndarray) -> Tensor:
    """[N, j, D] float32"""
    import torch

    from .codecs import get_codec

    return get_codec(settings.codec).decode(torch.from_numpy(np.ascontiguousarray(tokens)), settings.size)
