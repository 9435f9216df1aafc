"""The index over the vectors: which kind for how many images, how many of its partitions a search looks into.

It is built outside the writers' lock. Rows that come meanwhile, and later, are found by comparing with each of them,
until `optimize` takes them in.
"""

from __future__ import annotations

from typing import Any

from .format import SUMMARIES, again, first_line, guarded, lock, of_engine
from .store import CacheStore

LEAST = 256  # rows that an index needs
GRAPHS_UP_TO = 2_000_000  # rows; an HNSW graph over more takes hours and its memory
GRAPH_ROWS, LIST_ROWS = 2**16, 2**12  # rows of a partition: with a graph, and read from end to end
STALE = 0.1  # share of the rows that may be outside the index without a word


def partitions_of(rows: int) -> tuple[str, int]:
    """(kind, partitions) for so many rows: HNSW graphs of 8-bit vectors, or lists of rotated binary codes."""
    if rows <= GRAPHS_UP_TO:
        return "hnsw_sq", max(1, rows // GRAPH_ROWS)
    return "ivf_rq", max(1, rows // LIST_ROWS)


def probes(cache: CacheStore) -> int:
    """Partitions that a search looks into: all graphs up to 20, more by the square root; a fiftieth of the lists."""
    stats = stats_of(cache)
    kind, partitions = partitions_of(stats.num_indexed_rows if stats else 0)
    if kind == "hnsw_sq":
        return min(partitions, 20)
    return max(20, partitions // 50)


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


def build(cache: CacheStore, kind: str | None = None) -> dict[str, Any]:
    """Builds the index anew, while others may write.

    Args:
        kind: "hnsw_sq", "ivf_rq" or "ivf_pq"; default: by the number of rows.
    """
    from lancedb.index import HnswSq, IvfPq, IvfRq

    rows = cache.table(SUMMARIES).count_rows()
    if rows < LEAST:
        raise ValueError(f"{cache.path} has {rows} images: an index needs {LEAST}, and helps from 100,000 on.")
    own, partitions = partitions_of(rows)
    kind = kind or own
    if kind != own:
        partitions = max(1, rows // (GRAPH_ROWS if kind == "hnsw_sq" else LIST_ROWS))
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
