"""`fwd2bot cache export`: the summaries, or their vectors, for other programs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from ..files.writing import temporary_path
from .format import FILES, SUMMARIES, one_of
from .reader import SummaryCache
from .rows import decoded, tokens_in, vectors_in
from .tables import OK

KINDS = ("safetensors", "parquet", "numpy", "faiss")
BATCH = 1024  # contents that are read at once


def export(cache: SummaryCache, output: str | os.PathLike, kind: str = "safetensors") -> dict[str, Any]:
    """Writes one file, under a temporary name that is then renamed to `output`.

    safetensors: what `fwd2bot compress --output` writes; all of it is held in memory. parquet: id, source, embedding,
    summary (float16, flat) and what is known of the file. numpy: embeddings [N, D] float16, and the ids in
    `OUTPUT.ids.txt`. faiss: an IndexFlatIP of the embeddings, and the ids in `OUTPUT.ids.txt`.

    Raises:
        ValueError: the cache is empty. DamagedCache: a row of it is damaged. ImportError: a library is missing.
    """
    if not len(cache):
        raise ValueError(f"{cache.path} is empty: there is nothing to export.")
    target = Path(output)
    count = {"safetensors": _safetensors, "parquet": _parquet, "numpy": _numpy, "faiss": _faiss}[kind](cache, target)
    return {"output": str(output), "images": count, "bytes": target.stat().st_size}


def images(cache: SummaryCache, summaries: bool = True) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, Any]]:
    """(rows of files, vectors float16 [N, D], summaries [N, k, D] or None) of images that are whole, batch by batch."""
    for rows in cache.batches(SUMMARIES, size=BATCH):
        cache.check(rows)
        keys = rows["sha256"].to_pylist()
        place = {key: i for i, key in enumerate(keys)}
        files = cache.rows(FILES, None, f"{one_of('sha256', keys)} AND status = '{OK}'").to_pylist()
        files.sort(key=lambda row: row["source"])
        at = [place[row["sha256"]] for row in files]
        tokens = tokens_in(cache.settings, rows, cache.blocks)[at] if summaries else None
        yield files, vectors_in(rows)[at], None if tokens is None else decoded(cache.settings, tokens)


def _ids(files: list[dict[str, Any]], times: dict[str, int]) -> list[str]:
    """By id; by whole path where an id was there before."""
    found = []
    for row in files:
        times[row["id"]] = times.get(row["id"], 0) + 1
        found.append(row["id"] if times[row["id"]] == 1 else row["source"])
    return found


def _safetensors(cache: SummaryCache, output: Path) -> int:
    import torch

    from .summary_file import write_summaries

    ids, parts, vectors, times = [], [], [], {}
    for files, own, summary in images(cache):
        ids += _ids(files, times)
        parts.append(summary.half())
        vectors.append(torch.from_numpy(own.astype(np.float32)))
    skipped = [{"id": row["id"], "reason": row["reason"]} for row in cache.skipped()]
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    summary, embedding = torch.cat(parts)[order], torch.cat(vectors)[order]
    ids, settings = [ids[i] for i in order], cache.settings
    write_summaries(summary, embedding, output, ids, skipped, settings.fingerprint, settings.reading)
    return len(ids)


def _parquet(cache: SummaryCache, output: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = cache.settings
    names = [name for name in cache.table(FILES).schema.names if name not in ("status", "reason", "crc32")]
    own = [cache.table(FILES).schema.field(name) for name in names]
    shape = {b"k": str(settings.k).encode(), b"dim": str(settings.size).encode()}
    vector, summary = pa.list_(pa.float16(), settings.size), pa.list_(pa.float16(), settings.k * settings.size)
    schema = pa.schema([*own, ("embedding", vector), ("summary", summary)], metadata=shape)
    count = 0
    try:
        with pq.ParquetWriter(temporary_path(output), schema) as writer:
            for files, vectors, summaries in images(cache):
                columns = {n: pa.array([row[n] for row in files], schema.field(n).type) for n in names}
                columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), settings.size)
                flat = pa.array(summaries.half().numpy().ravel())
                columns["summary"] = pa.FixedSizeListArray.from_arrays(flat, settings.k * settings.size)
                writer.write_table(pa.table(columns, schema=schema))
                count += len(files)
        os.replace(temporary_path(output), output)
    finally:
        temporary_path(output).unlink(missing_ok=True)
    return count


def _numpy(cache: SummaryCache, output: Path) -> int:
    """The array is written as it comes, so that a large cache fits; its header is written last, with the count."""
    rows, size = len(cache), cache.settings.size
    written = 0
    try:
        array = np.lib.format.open_memmap(temporary_path(output), "w+", np.float16, (rows, size))
        with _names(output) as names:
            for files, vectors, _ in images(cache, summaries=False):
                files, vectors = files[: rows - written], vectors[: rows - written]
                array[written : written + len(files)] = vectors
                names.writelines(f"{name}\n" for name in _ids(files, names.times))
                written += len(files)
        array.flush()
        del array
        if written < rows:  # removed meanwhile
            raise ValueError(f"{cache.path} changed while it was read: export it again.")
        os.replace(temporary_path(output), output)
    finally:
        temporary_path(output).unlink(missing_ok=True)
    return written


def _faiss(cache: SummaryCache, output: Path) -> int:
    faiss = require("faiss", "faiss", "--to faiss")
    found, count = faiss.IndexFlatIP(cache.settings.size), 0
    with _names(output) as names:
        for files, vectors, _ in images(cache, summaries=False):
            found.add(np.ascontiguousarray(vectors.astype(np.float32)))
            names.writelines(f"{name}\n" for name in _ids(files, names.times))
            count += len(files)
    try:
        faiss.write_index(found, str(temporary_path(output)))
        os.replace(temporary_path(output), output)
    finally:
        temporary_path(output).unlink(missing_ok=True)
    return count


class _names:
    """The file OUTPUT.ids.txt: one id a line; a line end in an id is written as \\n."""

    def __init__(self, output: Path) -> None:
        self.target = output.with_name(f"{output.name}.ids.txt")
        self.times: dict[str, int] = {}

    def __enter__(self) -> _names:
        self.file = temporary_path(self.target).open("w", encoding="utf-8")
        return self

    def writelines(self, lines: Iterator[str]) -> None:
        self.file.writelines(line[:-1].replace("\\", "\\\\").replace("\n", "\\n") + "\n" for line in lines)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.file.close()
        if kind is None:
            os.replace(temporary_path(self.target), self.target)
        else:
            temporary_path(self.target).unlink(missing_ok=True)
