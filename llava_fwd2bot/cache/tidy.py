"""Upkeep while a cache is filled: joins small files and brings indexes up to date, in a bounded share of the time."""

from __future__ import annotations

import contextlib
import ctypes
import time
from datetime import timedelta
from typing import Any

from .format import COMMITS, FILES, SUMMARIES

RECENT = timedelta(hours=1)  # versions that are younger are kept
UNDO = timedelta(days=7)  # the same for the small table of files, whose versions undo `rm` and `prune`
EVERY = 64  # commits after which small files are joined
SHARE = 0.05  # of the time of a fill that upkeep may take
SMALL = 16 * 2**20  # bytes of summaries of a commit, below which its files are worth joining
LITTLE = 2**30  # bytes of all summaries, up to which they are joined whatever their number of files
UNINDEXED = 10_000  # summaries without an index that a look-up may scan


class Tidy:
    """Counts the commits of a fill.

    Joining and indexing read whole tables, so that their cost grows with the cache. They are repeated only once the
    last time was SHARE of the time since.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._commits, self._due = 0, 0.0

    def after_commit(self) -> None:
        self._commits += 1
        if self._commits < EVERY or time.monotonic() < self._due:
            return
        start = time.monotonic()
        self.cache.optimize(RECENT, UNDO, _names(worth_joining(self.cache)))
        give_back()
        end = time.monotonic()
        self._commits, self._due = 0, end + (end - start) / SHARE

    def finish(self) -> None:
        """At the end of a fill: all indexes are up to date, and small files are joined where that is cheap."""
        joined = worth_joining(self.cache)
        self.cache.optimize(RECENT, UNDO, _names(joined))
        if not joined:
            self.cache.index_keys(SUMMARIES, UNINDEXED)
        give_back()


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps what LanceDB's threads took to join files, 400 MB and more."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _names(summaries: bool) -> tuple[str, ...]:
    return (FILES, SUMMARIES, COMMITS) if summaries else (FILES, COMMITS)


def worth_joining(cache: Any) -> bool:
    """Whether the files of summaries are small and many; large ones are left alone, as joining rewrites them."""
    stats = cache.table(SUMMARIES).stats()
    files = stats["fragment_stats"]["num_fragments"]
    size = stats["num_rows"] * cache.bytes_of_row
    return files > 1 and (size <= LITTLE or (files >= EVERY and size < SMALL * files))
