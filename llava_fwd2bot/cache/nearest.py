"""The images nearest to a vector. Vectors belong to contents, and filters are conditions on files.

Candidates come from the index, or from all vectors, best first. The hits are their files that pass the filter. If they
are too few, more candidates are read. A filter that few files pass is applied first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .format import FILES, SUMMARIES, first_line, guarded, of_engine, one_of
from .index import effort
from .rows import vectors_in, wrong_vectors
from .store import MANY, CacheStore
from .tables import ABOUT, OK, users_columns

if TYPE_CHECKING:
    from torch import Tensor

EXACT_BELOW = 100_000  # rows up to which a search compares with every row
NAMED = 20_000  # contents that a filter picks, up to which the vectors of all are read and compared
PART = 200  # contents whose files are looked up at once
CHECKED = 200  # candidates up to which vectors are read and checked with them; of more, those that are shown
WHOLE = ("width", "height", "sums", "embedding")  # what the checksum of a vector needs
MOST = 100_000  # candidates that the index is asked for


def nearest(
    cache: CacheStore, vector: Tensor, top: int, where: str | None, exact: bool | None, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """See `SummaryCache.search`."""
    files = cache.table(FILES)
    known = [*ABOUT, *users_columns(files.schema)]
    if unknown := set(columns) - {*known}:
        raise ValueError(f"There is no column {', '.join(sorted(unknown))}; there are {', '.join(known[1:])}.")
    total = cache.table(SUMMARIES).count_rows()
    top = min(top, len(cache)) if top > total else top
    by_index = not exact and (exact is False or total > EXACT_BELOW) and indexed(cache)
    ask, allowed = top + 10, None
    if where is not None:
        ask, allowed = 5 * top + 50, remembered(cache, where)
        if allowed is not None:
            ask = share_of(top, total, allowed)
    while True:
        whole, named = not by_index or ask > MOST, allowed is not None and len(allowed) <= NAMED
        if named:
            found = nearest_of(cache, vector, allowed)
        else:
            found = candidates(cache, vector, min(ask, total), not whole)
        if allowed is not None:
            found = [hit for hit in found if hit[0] in allowed]
        rows: list[dict[str, Any]] = []
        at, size = 0, 2 * top  # most often enough
        while at < len(found) and len(rows) < top:
            part = found[at : at + size]
            rows += files_of(cache, part if named or ask <= CHECKED else sound(cache, part), where, columns, known)
            at, size = at + size, PART
        if len(rows) >= top or (ask >= total and whole) or named:
            return rows[:top]
        if where is not None and allowed is None:
            allowed = contents(cache, where, known)
            ask = max(4 * ask, share_of(top, total, allowed))
        else:
            ask *= 4


def share_of(top: int, total: int, allowed: set[str]) -> int:
    """Candidates among which `top` are allowed, were they spread evenly; and half as many again."""
    return int(1.5 * top * total / max(1, len(allowed)))


def indexed(cache: CacheStore) -> bool:
    with guarded(cache.path):
        return any(index.columns == ["embedding"] for index in cache.table(SUMMARIES).list_indices())


def candidates(cache: CacheStore, vector: Tensor, ask: int, by_index: bool) -> list[tuple[str, float]]:
    """(SHA-256, cosine) of the nearest contents, best first; up to CHECKED of them without those that are damaged."""
    query = cache.table(SUMMARIES).search(
        vector.detach().cpu().half().numpy(), vector_column_name="embedding", query_type="vector"
    )
    query = query.distance_type("cosine").limit(max(1, ask))
    if by_index:
        probes, refined = effort(cache)
        query = query.nprobes(probes).refine_factor(max(2, -(-refined // max(1, ask))))
    else:
        query = query.bypass_vector_index()
    names = ["sha256", "_distance", *(WHOLE if ask <= CHECKED else ())]
    with guarded(cache.path):
        rows = query.select(names).to_arrow()
    hits = list(zip(rows["sha256"].to_pylist(), (1 - rows["_distance"].to_numpy()).tolist(), strict=True))
    if ask > CHECKED or not hits:
        return hits
    return [hit for hit, bad in zip(hits, wrong_vectors(rows), strict=True) if not bad]


def sound(cache: CacheStore, hits: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Those of the hits whose vectors are what was written."""
    rows = cache.rows(SUMMARIES, ["sha256", *WHOLE], one_of("sha256", [key for key, _ in hits]))
    bad = wrong_vectors(rows) if rows.num_rows else ()
    good = {key for key, wrong in zip(rows["sha256"].to_pylist(), bad, strict=True) if not wrong}
    return [hit for hit in hits if hit[0] in good]


def nearest_of(cache: CacheStore, vector: Tensor, keys: set[str]) -> list[tuple[str, float]]:
    """(SHA-256, cosine) of all of these contents, best first; their vectors are kept for the next search."""
    last = cache.last_filter
    if last.vectors is None:
        names, parts, ordered = [], [], sorted(keys)
        for at in range(0, len(ordered), MANY):
            rows = cache.rows(SUMMARIES, ["sha256", *WHOLE], one_of("sha256", ordered[at : at + MANY]))
            if rows.num_rows:
                good = ~wrong_vectors(rows)
                names += [key for key, fine in zip(rows["sha256"].to_pylist(), good, strict=True) if fine]
                parts.append(vectors_in(rows)[good].astype(np.float32))
        empty = np.empty((0, cache.settings.size), np.float32)
        last.vectors = (names, np.concatenate(parts) if parts else empty)
    names, vectors = last.vectors
    query = vector.detach().cpu().half().float().numpy()
    scores = vectors @ (query / max(float(np.linalg.norm(query)), 1e-12))
    return [(names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]


def files_of(
    cache: CacheStore, hits: Sequence[tuple[str, float]], where: str | None, columns: Sequence[str], known: list[str]
) -> list[dict[str, Any]]:
    """The files of these contents that a condition picks, in the order of the contents; of copies the first by path."""
    if not hits:
        return []
    condition = f"{one_of('sha256', [key for key, _ in hits])} AND status = '{OK}'"
    names = list(dict.fromkeys(["id", "source", "sha256", *columns]))
    rows = filtered(cache, names, condition, where, known)
    by_content: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_content.setdefault(row["sha256"], []).append(row)
    found = []
    for key, score in hits:
        for row in sorted(by_content.get(key, []), key=lambda row: row["source"]):
            found.append({**{n: row[n] for n in ("id", *columns)}, "score": score, "_source": row["source"]})
    return _spelled(cache, found)


def _spelled(cache: CacheStore, hits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hits by whole path where their id stands for several files."""
    names = sorted({hit["id"] for hit in hits})
    times: dict[str, int] = {}
    for at in range(0, len(names), PART):
        for row in cache.rows(FILES, ["id"], f"{one_of('id', names[at : at + PART])} AND status = '{OK}'").to_pylist():
            times[row["id"]] = times.get(row["id"], 0) + 1
    for hit in hits:
        source = hit.pop("_source")
        if times.get(hit["id"], 0) > 1:
            hit["id"] = source
    return hits


@dataclass
class Filter:
    """What a condition picked, kept for the next search with the same one; `vectors`: of few contents, with names."""

    where: str
    versions: tuple[int, int]
    contents: set[str]
    vectors: tuple[list[str], np.ndarray] | None = None


def contents(cache: CacheStore, where: str, known: list[str]) -> set[str]:
    """The contents of the files that a condition picks."""
    versions = (cache.table(FILES).version, cache.table(SUMMARIES).version)
    found = {row["sha256"] for row in filtered(cache, ["sha256"], f"status = '{OK}'", where, known)}
    cache.last_filter = Filter(where, versions, found)
    return found


def remembered(cache: CacheStore, where: str) -> set[str] | None:
    """What `contents` found for the same condition, while nothing has changed."""
    last, versions = cache.last_filter, (cache.table(FILES).version, cache.table(SUMMARIES).version)
    return last.contents if last and (last.where, last.versions) == (where, versions) else None


def filtered(
    cache: CacheStore, names: list[str], condition: str, where: str | None, known: list[str]
) -> list[dict[str, Any]]:
    if where is None:
        return cache.rows(FILES, names, condition).to_pylist()
    with filter_error(where, known):
        # in brackets: the parser takes the longest condition that it understands, and drops what follows
        return cache.table(FILES).search().where(f"({where}) AND {condition}").select(names).limit(None).to_list()


@contextmanager
def filter_error(where: str | None, known: Sequence[str]) -> Iterator[None]:
    """ValueError that names the filter and the columns, for whatever LanceDB raises within."""
    if where is not None:
        check_filter(where)
    try:
        yield
    except BaseException as error:
        if where is None or not of_engine(error):
            raise
        columns, problem = ", ".join(known), _problem(error)
        raise ValueError(f"The filter {where!r} does not work: {problem}. Columns: {columns}.") from error


def _problem(error: BaseException) -> str:
    """What the engine found wrong, without the statement that a parser's error quotes before it."""
    told = re.search(r"\((sql parser error: .*)\)", str(error), re.DOTALL)
    return told[1] if told else first_line(error).rstrip(".")


# functions by which a short condition makes a text of any length, and thereby ends the process for lack of memory
_MULTIPLY = "repeat|lpad|rpad|generate_series|range|array_repeat|list_repeat|array_resize|list_resize"
# a call of one; the name may be quoted, and comments may stand before its bracket
_CALL = re.compile(rf"""\b({_MULTIPLY})["`]?(?:\s|/\*.*?\*/|\*/|--[^\n]*\n)*\(""", re.IGNORECASE | re.DOTALL)


def check_filter(where: str) -> None:
    """ValueError for a condition that could end the process, and not the search alone."""
    if call := _CALL.search(where):
        raise ValueError(f"The filter {where[:200]!r} does not work: {call[1]}() is not allowed in a filter.")
