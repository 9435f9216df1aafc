"""`fwd2bot cache verify | stats | export | merge | vacuum | prune | index`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .codecs import CODECS
from .format import EXACT_BELOW, TOLD, asked, column, first_line, one_of
from .reader import SummaryCache

MOST = 32 * 2**20  # bytes of rows in memory at a time
PARTITION = 2**16  # rows of a partition of the index


def batches(cache: SummaryCache, columns: list[str] | None = None) -> Iterator[Any]:
    """All rows as pyarrow tables of about MOST bytes, of one version of the cache; ValueError if it cannot be read."""
    import pyarrow as pa

    table, settings = cache.table(), cache.settings
    row = settings.k * cache.codec.bytes_per_token(settings.size) + 2 * settings.size
    query = table.search().select(columns or table.schema.names).limit(None)
    stream = iter(query.to_batches(max(16, MOST // row)))
    while (batch := asked(lambda: next(stream, None), None, table)) is not None:
        yield pa.Table.from_batches([batch])


def verify(cache: SummaryCache) -> dict[str, Any]:
    """Reads every row: its checksum, that its numbers are finite, that no id is there twice; skipped files, index.

    Returns:
        {"rows", "damaged": ids, "twice": ids, "unreadable": what stopped the reading or None, "ok"}
    """
    names, damaged, unreadable = Counter(), [], None
    stored = [column(block) for block in cache.blocks]
    with tqdm(total=len(cache), unit="image", desc="verify") as bar:
        try:
            for rows in batches(cache, [*TOLD, "crc32", "embedding", *stored]):
                data = cache.tokens(rows, stored)
                damaged += cache.damaged(rows, data)
                finite = torch.isfinite(cache.codec.decode(data, cache.settings.size)).flatten(1).all(1)
                ids = rows["id"].to_pylist()
                damaged += [name for name, good in zip(ids, finite.tolist(), strict=True) if not good]
                names.update(ids)
                bar.update(rows.num_rows)
            cache.skipped()
            if cache.table().list_indices():
                cache.search(torch.ones(cache.settings.size), exact=False)
        except (RuntimeError, OSError, ValueError) as error:  # a file of it is missing or cut
            unreadable = first_line(error)
    twice = sorted(name for name, times in names.items() if times > 1)
    damaged = sorted(set(damaged))
    found = {"rows": names.total(), "damaged": damaged, "twice": twice, "unreadable": unreadable}
    return {**found, "ok": not (damaged or twice or unreadable)}


def stats(cache: SummaryCache) -> dict[str, Any]:
    """Rows, bytes on disk, and bytes per image: of the summary, of the vector, and of the image's own file."""
    rows, settings = len(cache), cache.settings
    token = cache.codec.bytes_per_token(settings.size)
    total = on_disk(cache)
    sources = sum(rows["bytes"].combine_chunks().sum().as_py() or 0 for rows in batches(cache, ["bytes"]))
    found: dict[str, Any] = {"rows": rows, "skipped": len(cache.skipped()), "k": settings.k, "dim": settings.size}
    found |= {"codec": settings.codec, "model": settings.model, "bytes": total}
    found |= settings.reading.told()
    found["bytes_per_image"] = settings.k * token
    found["bytes_per_vector"] = 2 * settings.size
    found["bytes_on_disk_per_image"] = None if total is None or not rows else round(total / rows, 1)
    found["bytes_per_source_image"] = round(sources / rows, 1) if rows else None
    found["bytes_per_image_by_codec"] = {
        name: settings.k * codec.bytes_per_token(settings.size) for name, codec in CODECS.items()
    }
    return found


def export(cache: SummaryCache, output: str | os.PathLike, store_dtype: str = "float16") -> dict[str, Any]:
    """Writes the file that `fwd2bot compress --output` writes, which `ask --summaries` and training read."""
    from .summary_file import write_summaries

    ids, parts, vectors = [], [], []
    stored = [column(block) for block in cache.blocks]
    for rows in batches(cache, [*TOLD, "crc32", "embedding", *stored]):
        data = cache.tokens(rows, stored)
        cache.check(rows, data)
        ids += rows["id"].to_pylist()
        parts.append(cache.codec.decode(data, cache.settings.size).to(getattr(torch, store_dtype)))
        vectors.append(torch.from_numpy(cache.vectors(rows).astype("float32")))
    if not ids:
        raise ValueError(f"{cache.path} is empty: there is nothing to export.")
    skipped = [{"id": row["id"], "reason": row["reason"]} for row in cache.skipped()]
    summary, embedding = torch.cat(parts), torch.cat(vectors)
    write_summaries(summary, embedding, Path(output), ids, skipped, cache.settings.fingerprint, cache.settings.reading)
    return {"output": str(output), "images": len(ids), "bytes": Path(output).stat().st_size}


def merge(into: SummaryCache, other: SummaryCache) -> dict[str, Any]:
    """Adds the images of another cache of the same model, k and codec; of the same id the one already there stays.

    Raises:
        ValueError: they are not of the same model, k or codec, or an id is of different images; nothing is added.
    """
    same = ("fingerprint", "k", "size", "codec", "pooling", "quantised", "exif_orientation", "transparency")
    for name in same:
        ours, theirs = getattr(into.settings, name), getattr(other.settings, name)
        if ours != theirs:
            raise ValueError(f"{other.path} has {name} = {theirs}, {into.path} has {ours}: they cannot be joined.")
    added = 0
    for rows in batches(other, ["id", "sha256"]):
        theirs = dict(zip(*(rows[name].to_pylist() for name in ("id", "sha256")), strict=True))
        for row in into.about(["id", "sha256"], one_of("id", list(theirs))):
            if row["sha256"] != theirs[row["id"]]:
                raise ValueError(f"{row['id']} is one image in {into.path} and another in {other.path}.")
    for rows in batches(other):
        there = {row["id"] for row in into.about(["id"], one_of("id", rows["id"].to_pylist()))}
        fresh = rows.filter([name not in there for name in rows["id"].to_pylist()])
        if fresh.num_rows:
            into.put(fresh)
            added += fresh.num_rows
    known = {row["id"] for row in into.about(["id"])}
    into.skip([row for row in other.skipped() if row["id"] not in known], broken=False)
    return {"added": added, "rows": len(into)}


def vacuum(cache: SummaryCache, older_than: float = 1.0) -> dict[str, Any]:
    """Joins small files, brings the index up to date, and removes versions older than so many hours."""
    before = on_disk(cache)
    cache.optimize(timedelta(hours=older_than))
    return {"bytes_before": before, "bytes": on_disk(cache), "rows": len(cache)}


def prune(cache: SummaryCache) -> dict[str, Any]:
    """Takes out the images, and the skipped files, whose file is not there any more."""
    gone = [row["id"] for row in cache.about(["id", "source"]) if not Path(row["source"]).exists()]
    gone += [row["id"] for row in cache.skipped() if not Path(row["source"]).exists()]
    for at in range(0, len(gone), 1000):
        cache.forget(gone[at : at + 1000])
    return {"removed": len(gone), "rows": len(cache)}


def on_disk(cache: SummaryCache) -> int | None:
    if not cache.local:
        return None
    return sum(file.stat().st_size for file in Path(cache.path).rglob("*") if file.is_file())


def index(cache: SummaryCache) -> dict[str, Any]:
    """Builds the index over the vectors anew: IVF with an HNSW graph of 8-bit vectors in each partition.

    Rows that come later are found without it, by comparing with each, until `vacuum` takes them in.
    """
    rows = len(cache)
    if rows < 256:
        raise ValueError(f"{cache.path} has {rows} images: an index needs 256, and helps from {EXACT_BELOW:,} on.")
    partitions = max(1, rows // PARTITION)
    cache.build_index(partitions)
    return {"rows": rows, "partitions": partitions}
