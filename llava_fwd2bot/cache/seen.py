"""Hashes of the keys that a table holds, in memory, so that a fill need not look up what is certainly new.

A look-up in the table takes longer as the table grows: rows that its index does not cover are scanned. In a fill nearly
every look-up finds nothing. These hashes answer that case alone: a value that is not among them is not in the table.
For a value that is, the table is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from .format import COMMITS, RESTORING, guarded

WORTH = 100  # the hashes are loaded once 1/WORTH of the table's rows have been looked up
BATCH = 65536  # rows of one reading
REWRITTEN = (RESTORING, "restore", "repair")  # commits by which rows come back under row ids of long ago


class Seen:
    """The values of one column of one table, as far as they were read; values that were removed stay among them.

    Row ids grow from commit to commit, so that only the rows after the last one are read again.

    Args:
        cache: a CacheStore.
    """

    def __init__(self, cache: Any, name: str, column: str) -> None:
        self.cache, self.name, self.column = cache, name, column
        self._mutex = threading.Lock()
        self._asked = 0
        self._clear()

    def _clear(self) -> None:
        self._version = -1  # of the table, up to which its rows are known; -1: they were not read yet
        self._commits, self._rewritten = -1, -1  # version of the commits, and how many of them brought rows back
        self._last = -1  # the highest row id that was read
        self._levels: list[_Level] = []  # each more than twice as long as the next

    def __len__(self) -> int:
        return sum(len(level.hashes) for level in self._levels)

    def may_have(self, values: Sequence[str], newest: bool = False) -> np.ndarray | None:
        """Which of the values the table may have, bool [N]; None while loading the hashes costs more than looking up.

        Args:
            newest: it must hold for the newest version, also on file systems that show late what others have committed.
        """
        with self._mutex:
            if self._version < 0:
                self._asked += len(values)
                if self._asked * WORTH < self.cache.table(self.name).count_rows():
                    return None
            self._read_new(newest)
            return self._contains(self._hashes(values))

    def note(self, before: int, values: Sequence[str]) -> None:
        """After a commit by this process: the table went from version `before` to its newest one by adding `values`.

        They need not be read then. It is called under the writers' lock, so that no other commit lies in between.
        """
        with self._mutex:
            if self._version == before >= 0:
                self._add(self._hashes(values))
                self._version = self.cache.table(self.name).version

    # ------------------------------------------------------------------ parts
    def _hashes(self, values: Sequence[str | None]) -> np.ndarray:
        """Python's hash of each: keyed anew in each process, so that no file can be made to collide."""
        return np.fromiter(map(hash, values), np.int64, len(values)).view(np.uint64)

    def _contains(self, hashes: np.ndarray) -> np.ndarray:
        found = np.zeros(len(hashes), bool)
        for level in self._levels:
            found |= level.contains(hashes)
        return found

    def _read_new(self, newest: bool) -> None:
        commits = self.cache.version(COMMITS, newest)
        if commits != self._commits:
            kinds = ", ".join(f"'{kind}'" for kind in REWRITTEN)
            with guarded(self.cache.path):
                rewritten = self.cache.table(COMMITS).count_rows(f"what IN ({kinds})")
            if rewritten != self._rewritten:
                self._clear()
            self._commits, self._rewritten = commits, rewritten
        version = self.cache.version(self.name, newest)
        if version == self._version:
            return
        with guarded(self.cache.path):
            table = self.cache.table(self.name)
            query = table.search().with_row_id(True).select([self.column]).limit(None)
            if self._last >= 0:
                query = query.where(f"_rowid > {self._last}")
            for batch in query.to_batches(BATCH):
                if batch.num_rows:
                    self._add(self._hashes(batch.column(self.column).to_pylist()))
                    self._last = max(self._last, int(batch.column("_rowid").to_numpy().max()))
        self._version = version

    def _add(self, hashes: np.ndarray) -> None:
        hashes = np.unique(hashes)
        fresh = hashes[~self._contains(hashes)]  # joining files gives known rows new row ids
        while len(self._levels) and len(self._levels[-1].hashes) <= 2 * len(fresh):
            fresh = np.concatenate((self._levels.pop().hashes, fresh))
            fresh.sort()
        if len(fresh):
            self._levels.append(_Level(fresh))


class _Level:
    """Sorted hashes, and where each group with equal highest bits begins.

    Hashes are spread evenly, so that each of these buckets holds two to four. A bisection of the whole array would read
    memory all over it for every value that is looked for.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes  # [N] uint64, sorted
        bits = max(1, len(hashes).bit_length() - 2)
        self.shift = np.uint64(64 - bits)
        counts = np.bincount((hashes >> self.shift).astype(np.int64), minlength=1 << bits)
        self.starts = np.concatenate(([0], counts.cumsum())).astype(np.uint32)  # [2^bits + 1]

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the hashes are here, bool [N]."""
        bucket = (hashes >> self.shift).astype(np.int64)
        at, end = self.starts[bucket], self.starts[bucket + 1]
        found = np.zeros(len(hashes), bool)
        left = np.flatnonzero(at < end)
        while len(left):
            here = self.hashes[at[left]]
            found[left] = here == hashes[left]
            at[left] += 1
            left = left[(here < hashes[left]) & (at[left] < end[left])]
        return found
