"""Reads and checks every row of a cache.

It reads window by window. A window that cannot be read is halved, until few unreadable rows are left.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .format import COMMITS, FILES, SUMMARIES, first_line, of_engine, quoted
from .reader import SummaryCache
from .rows import decoded, tokens_in, wrong_files, wrong_summaries
from .sizes import bytes_per_token
from .store import MANY
from .tables import INDEXED, LOST, OK
from .writer import prefixes

MOST = 32 * 2**20  # bytes of rows in memory at a time
WINDOW = 4096  # rows of one reading
GIVEN_UP = 16  # rows of a window that is not halved any more


@dataclass
class Findings:
    """What `look` found.

    bad: by table, row ids that are not what was written, or cannot be read. twice: by table, row ids of later doubles.
    lost: rows of files whose summary is not there or damaged. problems: of whole tables and indexes.
    """

    rows: int = 0
    orphans: int = 0
    bad: dict[str, list[int]] = field(default_factory=lambda: {SUMMARIES: [], FILES: []})
    twice: dict[str, list[int]] = field(default_factory=lambda: {SUMMARIES: [], FILES: []})
    named: list[str] = field(default_factory=list)  # ids that are damaged
    doubled: list[str] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.named or self.doubled or self.problems or any(self.bad.values()))


def verify(cache: SummaryCache) -> dict[str, Any]:
    """Reads every row: checksums, that numbers are finite, that no key is there twice; commits, indexes.

    Returns:
        {"rows", "damaged": ids, "twice": ids, "unreadable": what else is wrong or None, "ok"}
    """
    found = look(cache)
    return {
        "rows": found.rows,
        "damaged": sorted(set(found.named)),
        "twice": sorted(set(found.doubled)),
        "unreadable": "; ".join(found.problems) or None,
        "ok": found.ok,
    }


def look(cache: SummaryCache) -> Findings:
    """All that is wrong, with the row ids by which it is mended."""
    found = Findings()
    with tqdm(total=cache.table(SUMMARIES).count_rows(), unit="image", desc="verify") as bar:
        good = _summaries(cache, found, bar)
        _files(cache, found, good)
    for name in (SUMMARIES, FILES):
        _indexes(cache, name, found)
    _commits(cache, found)
    return found


def _summaries(cache: SummaryCache, found: Findings, bar: tqdm) -> np.ndarray:
    """The first 64 bits of the contents whose summaries are whole, sorted."""
    settings, seen = cache.settings, []
    row = settings.k * bytes_per_token(settings.codec, settings.size) + 2 * settings.size
    for ids, rows, error in windows(cache, SUMMARIES, max(16, min(WINDOW, MOST // row))):
        if rows is None:
            _unreadable(found, SUMMARIES, ids, error)
            continue
        wrong = wrong_summaries(settings, rows, cache.blocks)
        finite = decoded(settings, tokens_in(settings, rows, cache.blocks)).isfinite().flatten(1).all(1).numpy()
        wrong |= ~finite
        found.bad[SUMMARIES] += ids[wrong].tolist()
        keys = prefixes(rows["sha256"].to_pylist())
        seen.append((keys[~wrong], ids[~wrong]))
        bar.update(rows.num_rows)
    keys, twice = _doubles(seen)
    found.twice[SUMMARIES] = twice
    found.doubled += _names(cache, SUMMARIES, "sha256", twice)
    return keys


def _doubles(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, list[int]]:
    """(all keys, sorted; the row ids of those that come again) of (keys, row ids), both uint64."""
    if not parts:
        return np.empty(0, np.uint64), []
    keys, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    return keys, places[order][again].tolist()


def _names(cache: SummaryCache, name: str, column: str, ids: list[int]) -> list[str]:
    found: list[str] = []
    for at in range(0, len(ids), MANY):
        condition = f"_rowid IN ({', '.join(map(str, ids[at : at + MANY]))})"
        found += cache.rows(name, [column], condition)[column].to_pylist()
    return found


def _files(cache: SummaryCache, found: Findings, good: np.ndarray) -> None:
    used = np.zeros(len(good), bool)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, rows, error in windows(cache, FILES, WINDOW):
        if rows is None:
            _unreadable(found, FILES, ids, error)
            continue
        wrong = wrong_files(rows)
        found.bad[FILES] += ids[wrong].tolist()
        status, names = rows["status"].to_pylist(), rows["id"].to_pylist()
        keys = prefixes(rows["sha256"].to_pylist())
        at = np.searchsorted(good, keys).clip(max=max(0, len(good) - 1))
        there = good[at] == keys if len(good) else np.zeros(len(keys), bool)
        owned = np.array([state == OK for state in status], bool)
        used[at[there & owned & ~wrong]] = True
        missing = owned & ~there & ~wrong
        found.rows += int(owned.sum())
        found.named += [str(names[i]) for i in np.flatnonzero(wrong | missing)]
        if missing.any():
            found.lost += rows.filter(missing.tolist()).to_pylist()
        found.named += [name for name, state in zip(names, status, strict=True) if state == LOST]
        sources = [str(source).encode("utf-8", "replace") for source in rows["source"].to_pylist()]
        hashes = b"".join(hashlib.blake2b(source, digest_size=8).digest() for source in sources)
        seen.append((np.frombuffer(hashes, np.uint64), ids))
    found.twice[FILES] = _doubles(seen)[1]
    found.doubled += _names(cache, FILES, "source", found.twice[FILES])
    found.orphans = int((~used).sum())


def _unreadable(found: Findings, name: str, ids: np.ndarray, error: str) -> None:
    found.bad[name] += ids.tolist()
    problem = f"{name} cannot be read in part ({error})"
    if problem not in found.problems:
        found.problems.append(problem)


def _indexes(cache: SummaryCache, name: str, found: Findings) -> None:
    """Whether each index tells as many rows as there are, part by part."""
    try:
        table = cache.table(name)
        there = {index.columns[0] for index in table.list_indices()}
        for column in INDEXED[name]:
            if column not in there:
                found.problems.append(f"{name} has no index of {column}")
                continue
            counts = Counter()
            for rows in cache.batches(name, [column], 65536):
                counts.update(str(value)[:1] for value in rows[column].to_pylist() if value)
            for first, here in counts.items():
                following = "\ue000" if first == "\ud7ff" else chr(ord(first) + 1)
                condition = f"{column} >= {quoted(first)} AND {column} < {quoted(following)}"
                if cache.rows(name, [column], condition).num_rows != here:
                    found.problems.append(f"the index of {column} in {name} is damaged")
                    break
        if "embedding" in there:
            vector = np.ones(cache.settings.size, np.float32)
            table.search(vector, vector_column_name="embedding").distance_type("cosine").limit(10).to_arrow()
    except BaseException as error:
        if not of_engine(error):
            raise
        found.problems.append(f"an index of {name} cannot be read ({first_line(error)})")


def _commits(cache: SummaryCache, found: Findings) -> None:
    """Whether the tables are as the newest commit left them, or newer."""
    try:
        rows = sorted(cache.rows(COMMITS).to_pylist(), key=lambda row: row["at"])
        mended = max((i for i, row in enumerate(rows) if row["what"] == "repair"), default=0)
        for name in (SUMMARIES, FILES):
            table = cache.table(name)
            here, count = table.version, table.count_rows()
            newest = max(rows[mended:], key=lambda row: row[f"{name}_version"], default=None)
            if newest is None:
                continue
            if newest[f"{name}_version"] > here:
                versions = f"version {here} is the newest, {newest[f'{name}_version']} was committed"
                found.problems.append(f"{name} has lost its newest commits: {versions}")
            elif newest[f"{name}_version"] == here and newest[f"{name}_rows"] != count:
                found.problems.append(f"{name} has {count} rows, {newest[f'{name}_rows']} were committed")
    except BaseException as error:
        if not of_engine(error) and not isinstance(error, TypeError):  # TypeError: a number that is damaged is none
            raise
        found.problems.append(f"{COMMITS} cannot be read ({first_line(error)})")


def windows(cache: SummaryCache, name: str, size: int) -> Iterator[tuple[np.ndarray, Any, str]]:
    """(row ids, rows with all columns, "") of windows of a table; (row ids, None, why) of what cannot be read."""
    table = cache.table(name)

    def read(at: int, count: int) -> Iterator[tuple[np.ndarray, Any, str]]:
        try:
            rows = table.search().with_row_id(True).offset(at).limit(count).to_arrow()
            rows.validate(full=True)
            if rows.num_rows != count:
                raise ValueError(f"{rows.num_rows} of {count} rows were read")
            ids = rows["_rowid"].to_numpy()
            yield ids, rows.drop_columns(["_rowid"]), ""
        except BaseException as error:
            if not of_engine(error):
                raise
            if count <= GIVEN_UP:
                ids = table.search().select(["_rowid"]).offset(at).limit(count).to_arrow()["_rowid"].to_numpy()
                yield ids, None, first_line(error)
                return
            half = count // 2
            yield from read(at, half)
            yield from read(at + half, count - half)

    total = table.count_rows()
    for at in range(0, total, size):
        yield from read(at, min(size, total - at))
