"""Checksums of rows. A summary has one for each block of tokens, so that a prefix can be checked; a file's row has one.

All are CRC-32 and begin with the row's key, so that the bytes of another row do not pass. `sums` of a summary are
little-endian uint32: of the vector, of the size, then of each block of tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

OWN = 2  # sums before those of the blocks


def sums_of(
    keys: Sequence[str],
    sizes: Sequence[Sequence[int]],
    vectors: np.ndarray,
    tokens: np.ndarray,
    blocks: Sequence[tuple[int, int]],
) -> np.ndarray:
    """[N, OWN + blocks] uint32

    Args:
        sizes: width and height of each image. vectors: [N, D] float16. tokens: [N, ≥ the last block's end, B] uint8.
    """
    found = np.empty((len(keys), OWN + len(blocks)), "<u4")
    vectors = np.ascontiguousarray(vectors.astype("<f2", copy=False))
    parts = [np.ascontiguousarray(tokens[:, first:last]) for first, last in blocks]
    for i, key in enumerate(keys):
        start = zlib.crc32(key.encode("utf-8", "surrogatepass"))
        found[i, 0] = zlib.crc32(vectors[i], start)
        found[i, 1] = zlib.crc32(f"{sizes[i][0]}x{sizes[i][1]}".encode(), start)
        for at, part in enumerate(parts):
            found[i, OWN + at] = zlib.crc32(part[i], zlib.crc32(bytes([at]), start))
    return found


def checksums_of(rows: Any) -> np.ndarray:
    """The checksum of each row of `files` (a pyarrow table) over all its columns but `crc32` itself, int64 [N].

    A column without a value adds nothing, so that a new, empty column of a user changes no checksum.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = []
    for name in sorted(set(rows.schema.names) - {"crc32"}):
        values = rows[name].combine_chunks()
        if pa.types.is_temporal(values.type) or pa.types.is_floating(values.type):
            wide = values if pa.types.is_temporal(values.type) else values.cast(pa.float64())
            values = wide.view(pa.int64())
        text = values if pa.types.is_string(values.type) else values.cast(pa.string())
        parts.append(pc.binary_join_element_wise(name, text, "="))
    joined = pc.binary_join_element_wise(*parts, "\0", null_handling="skip")
    return np.array([zlib.crc32(line.as_buffer()) for line in joined.cast(pa.binary())], np.int64)
