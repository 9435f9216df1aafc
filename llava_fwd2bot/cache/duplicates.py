"""`fwd2bot cache dedup`: files of the same bytes, and images that look alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .format import FILES, SUMMARIES, one_of
from .reader import SummaryCache
from .rows import vectors_in
from .tables import OK
from .writer import prefixes


def copies(cache: SummaryCache) -> list[list[str]]:
    """Groups of files of the same bytes, by their paths."""
    groups: dict[str, list[str]] = {}
    seen: set[int] = set()
    twice: set[int] = set()
    for rows in cache.batches(FILES, ["sha256"], 65536):  # first by 64 bits, which fit
        for key in prefixes(rows["sha256"].to_pylist()).tolist():
            (twice if key in seen else seen).add(key)
    twice.discard(0)
    for rows in cache.batches(FILES, ["sha256", "source", "status"], 65536) if twice else ():
        keys = prefixes(rows["sha256"].to_pylist()).tolist()
        for key, row in zip(keys, rows.to_pylist(), strict=True):
            if key in twice and row["status"] == OK:
                groups.setdefault(row["sha256"], []).append(row["source"])
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def near(cache: SummaryCache, least: float, neighbours: int = 10) -> Iterator[tuple[str, str, float]]:
    """(path, path, cosine) of different contents that are at least so alike; by the index where there is one.

    Args:
        least: the cosine. neighbours: of each image that are looked at.
    """
    import torch

    done: set[tuple[str, str]] = set()
    for rows in cache.batches(SUMMARIES, ["sha256", "embedding"], 1024):
        names = _first_paths(cache, rows["sha256"].to_pylist())
        for key, vector in zip(rows["sha256"].to_pylist(), vectors_in(rows), strict=True):
            if key not in names:
                continue
            for hit in cache.search(torch.from_numpy(np.array(vector)), neighbours, columns=("source", "sha256")):
                pair = tuple(sorted((names[key], hit["source"])))
                if hit["sha256"] != key and hit["score"] >= least and pair not in done:
                    done.add(pair)
                    yield *pair, hit["score"]


def _first_paths(cache: SummaryCache, keys: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    rows = cache.rows(FILES, ["sha256", "source"], f"{one_of('sha256', keys)} AND status = '{OK}'").to_pylist()
    for row in sorted(rows, key=lambda row: row["source"]):
        found.setdefault(row["sha256"], row["source"])
    return found
