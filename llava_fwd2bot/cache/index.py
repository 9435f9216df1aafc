"""The vector index: its kinds, its number of partitions, and how many of them a search probes.

It is built outside the writers' lock. Rows that are added meanwhile, or later, are compared one by one in a search,
until `optimize` adds them to the index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .format import SUMMARIES, again, first_line, guarded, lock, of_engine
from .store import CacheStore

LEAST = 256  # rows that an index needs
STALE = 0.1  # share of the rows that may be outside the index without a word


@dataclass(frozen=True)
class Kind:
    """Of an index: rows of a partition; which share of them is looked into, but at least `probes`; and of how many hits
    at the least the vectors themselves are read, to put them in order."""

    rows: int
    share: float
    probes: int
    refined: int


KINDS = {
    "hnsw_sq": Kind(2**16, 0.25, 20, 20),  # graphs of 8-bit vectors
    "ivf_rq": Kind(2**12, 0.05, 24, 200),  # lists of rotated binary codes
    "ivf_pq": Kind(2**12, 0.05, 24, 200),  # lists of product codes
}


DEFAULT = "ivf_rq"


def partitions_of(kind: str, rows: int) -> int:
    return max(1, rows // KINDS[kind].rows)


def effort(cache: CacheStore) -> tuple[int, int]:
    """(partitions that a search looks into, hits whose vectors are read) of the index that is there."""
    stats = stats_of(cache)
    name = str(stats.index_type).lower() if stats else ""
    kind = next((kind for kind in KINDS if kind in name.replace("ivf_hnsw", "hnsw")), "hnsw_sq")
    partitions, own = partitions_of(kind, stats.num_indexed_rows if stats else 0), KINDS[kind]
    return max(own.probes, int(own.share * partitions)), own.refined


def stats_of(cache: CacheStore) -> Any:
    table = cache.table(SUMMARIES)
    with guarded(cache.path):
        for index in table.list_indices():
            if index.columns == ["embedding"]:
                return table.index_stats(index.name)
    return None


def missing(cache: CacheStore, exact_below: int) -> str | None:
    """What to tell the user of an index that is not there or is stale; None where all is well."""
    rows, stats = cache.table(SUMMARIES).count_rows(), stats_of(cache)
    if rows <= exact_below:
        return None
    if stats is None:
        return f"{cache.path} has {rows:,} images and no index: `fwd2bot cache index {cache.path}` makes searches fast"
    if stats.num_unindexed_rows > STALE * rows:
        return (
            f"{stats.num_unindexed_rows:,} of {rows:,} images are not in the index yet: "
            f"`fwd2bot cache optimize {cache.path}` takes them in"
        )
    return None


def build(cache: CacheStore, kind: str = DEFAULT) -> dict[str, Any]:
    """Builds the index anew, while others may write.

    Args:
        kind: of KINDS; the default finds as much, as fast, as graphs do, and is built in a tenth of the time
            (eval/results/cache.md).
    """
    from lancedb.index import HnswSq, IvfPq, IvfRq

    rows = cache.table(SUMMARIES).count_rows()
    if rows < LEAST:
        raise ValueError(f"{cache.path} has {rows} images: an index needs {LEAST}, and helps from 100,000 on.")
    partitions = partitions_of(kind, rows)
    kinds = {"hnsw_sq": HnswSq, "ivf_rq": IvfRq, "ivf_pq": IvfPq}
    config = kinds[kind](distance_type="cosine", num_partitions=partitions)
    with lock(cache.path, ".indexing"):  # nobody joins files meanwhile: rows would move
        table = cache.table(SUMMARIES)
        try:
            again(lambda: table.create_index("embedding", config=config, replace=True))
        except BaseException as error:
            if not of_engine(error):
                raise
            raise OSError(f"The index of {cache.path} could not be built: {first_line(error)}") from error
    return {"rows": rows, "kind": kind, "partitions": partitions}
