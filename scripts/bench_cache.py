"""How fast a large cache is filled, indexed and searched, and how much the index misses.

    python scripts/bench_cache.py --rows 1000000 --size 1024 --output eval/results/cache_search.json

Vectors are synthetic, of a distribution like that of trained embeddings: heaps of uneven size around centres, and a
spectrum that falls as a power of the channel (effective rank about a tenth of the size). Queries are rows with noise.
Each row has one token beside its vector, as what is measured is the search. With --keep a second call searches alone,
and tells the memory that this takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from llava_fwd2bot.cache.format import CacheSettings
from llava_fwd2bot.cache.index import build as build_index
from llava_fwd2bot.cache.maintenance import optimize
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cache.tables import COLUMNS
from llava_fwd2bot.files.text import read_any_json, read_json
from llava_fwd2bot.files.writing import write_json

BATCH = 20_000


class Source:
    """Batches of unit vectors [N, size], the same for the same seed."""

    def __init__(self, size: int, heaps: int = 2000, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.spectrum = torch.arange(1, size + 1).float().pow(-0.6)  # [size]
        self.centres = torch.randn(heaps, size, generator=self.generator) * self.spectrum
        self.shares = torch.rand(heaps, generator=self.generator).pow(2) + 0.01
        self.turn, _ = torch.linalg.qr(torch.randn(size, size, generator=self.generator))

    def __call__(self, count: int) -> Tensor:
        heap = torch.multinomial(self.shares, count, replacement=True, generator=self.generator)
        own = torch.randn(count, len(self.spectrum), generator=self.generator) * self.spectrum
        return normalize((self.centres[heap] + 0.8 * own) @ self.turn, dim=-1)

    def near(self, vectors: Tensor) -> Tensor:
        noise = torch.randn(vectors.shape, generator=self.generator) * self.spectrum
        return normalize(vectors + 0.3 * normalize(noise @ self.turn, dim=-1), dim=-1)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(path: Path, rows: int, size: int, queries: int, kind: str) -> dict[str, Any]:
    """Fills and indexes a cache; its queries lie beside it."""
    source, found = Source(size), {"rows": rows, "size": size, "queries": queries}
    cache = SummaryCache.create(path, CacheSettings("f" * 64, 1, size, "int2", "mean"))
    start, asked = time.perf_counter(), []
    for at in range(0, rows, BATCH):
        vectors = source(min(BATCH, rows - at))
        names = [f"{at + i:08d}" for i in range(len(vectors))]
        cache.add(names, vectors[:, None], vectors, [about(name) for name in names])
        asked.append(source.near(vectors[: -(-queries * BATCH // rows)]))
    found["fill_s"] = round(time.perf_counter() - start, 1)
    query = torch.cat(asked)[:queries]
    save_file({"queries": query}, path.with_suffix(".queries"))
    start = time.perf_counter()
    optimize(cache, 0)
    found["optimize_s"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    found |= {"index": build_index(cache, kind), "index_s": round(time.perf_counter() - start, 1)}
    found["peak_bytes_of_the_process"] = peak_bytes()
    found["bytes_on_disk"] = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    truth, exactly = timed(cache, query, exact=True)
    write_json(path.with_suffix(".truth"), truth)
    return found | {f"exact_{name}": value for name, value in exactly.items()}


def about(name: str) -> dict[str, Any]:
    """Of a row; one in a hundred is wider than 1,000 pixels."""
    key, width = hashlib.sha256(name.encode()).hexdigest(), 2000 if int(name) % 100 == 0 else 4
    return {"sha256": key, "source": f"/nowhere/{name}", "bytes": 10, "modified": 1, "width": width, "height": 3}


def timed(cache: SummaryCache, queries: Tensor, **options: Any) -> tuple[list[list[str]], dict[str, float]]:
    """The ids that each query finds, one query after the other, and how long they took."""
    for query in queries[:3]:  # the first opens files
        cache.search(query, **options)
    hits, seconds = [], []
    for query in queries:
        start = time.perf_counter()
        rows = cache.search(query, top=10, **options)
        seconds.append(time.perf_counter() - start)
        hits.append([row["id"] for row in rows])
    at = {"p50_ms": statistics.median(seconds), "p95_ms": sorted(seconds)[int(0.95 * len(seconds))]}
    return hits, {name: round(1000 * value, 2) for name, value in at.items()}


def search(path: Path) -> dict[str, Any]:
    """By the index: ids and scores alone, and with all metadata; and what is missed of the exact search."""
    cache, queries = SummaryCache.open(path), load_file(path.with_suffix(".queries"))["queries"]
    found: dict[str, Any] = {}
    truth = read_any_json(path.with_suffix(".truth"))
    for name, options in {
        "index": {},
        "index_with_metadata": {"columns": COLUMNS},
        "index_filter_of_1_percent": {"where": "width > 1000"},
    }.items():
        hits, took = timed(cache, queries, exact=False, **options)
        found |= {f"{name}_{which}": value for which, value in took.items()}
        if "where" in options:
            some = queries[:20]
            truth, _ = timed(cache, some, exact=True, **options)
        shares = [len({*mine} & {*right}) / max(1, len(right)) for mine, right in zip(hits, truth, strict=False)]
        found[f"{name}_recall_at_10"] = round(statistics.mean(shares), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kind", choices=("ivf_rq", "hnsw_sq", "ivf_pq"), default="ivf_rq", help="of the index")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="build the cache there, or use the one that is there")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (args.keep or Path(folder)) / "bench.cache"
        path.parent.mkdir(parents=True, exist_ok=True)
        built = path.with_suffix(".json")
        if not built.exists() and path.exists():
            raise SystemExit(f"{path} is half built: remove it, or choose another --keep")
        fresh = not built.exists()
        if fresh:
            write_json(built, build(path, args.rows, args.size, args.queries, args.kind))
        found = read_json(built)
        if [found[name] for name in ("rows", "size", "queries")] != [args.rows, args.size, args.queries]:
            raise SystemExit(f"{path} is of other rows, size or queries: choose another --keep")
        found |= search(path)
        if not fresh:  # of a process that has built it, the peak is the build's
            found["peak_bytes_of_searching"] = peak_bytes()
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    found |= {
        "date": str(date.today()),
        "machine": machine,
        "command": f"python scripts/bench_cache.py --rows {args.rows} --size {args.size} --queries {args.queries}"
        + (" --keep DIR" if args.keep else ""),
    }
    print(json.dumps(found))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
