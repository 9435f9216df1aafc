"""Which entries of a source are new: they are joined with the table `files`, block by block, in constant memory.

Entries that come in the order of their paths are joined by a range of the key's index; others are looked up one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from .entries import Entry
from .format import FILES, guarded, is_local, one_of, quoted
from .reader import SummaryCache
from .tables import BROKEN, OK
from .writer import MANY

BLOCK = 8192  # entries that are joined at once
WIDER = 4  # times as many rows as entries in a range, above which entries are looked up one by one


@dataclass
class Filled:
    """What came of a run: images compressed, found under another name, known already; ids that were skipped."""

    compressed: int = 0
    renamed: int = 0
    known: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Plan:
    """Picks from blocks of entries those that must be read; counts the others in `result`. Opens no file.

    Args:
        retry: also files that could not be used before and have not changed.
    """

    def __init__(self, cache: SummaryCache, retry: bool, result: Filled) -> None:
        self.cache, self.retry, self.result = cache, retry, result
        self.empty = True  # of an empty cache nothing is known, and nothing has moved

    def todo(self, entries: Sequence[Entry]) -> list[Entry]:
        entries = list({entry.source: entry for entry in entries}.values())  # a file may be given twice
        self.empty = self.empty and not self.cache.table(FILES).count_rows()
        rows, at = self._join(entries)
        same, status = np.zeros(len(entries), bool), np.full(len(entries), None, object)
        reasons: list[str | None] = [None] * len(entries)
        if rows is not None and rows.num_rows:
            there = at >= 0
            status[there] = np.array(rows["status"].to_pylist(), object)[at[there]]
            same = there.copy()
            for name in ("bytes", "modified"):
                own = np.array([getattr(entry, name) for entry in entries], np.int64)
                same[there] &= rows[name].to_numpy()[at[there]] == own[there]
            known = rows["reason"].to_pylist()
            reasons = [known[i] if i >= 0 else None for i in at]
        fresh, absent, back = [], [], []
        for i, entry in enumerate(entries):
            if entry.problem is not None:
                row = entry.row(reason=entry.problem)
                self.result.skipped.append(row)
                if reasons[i] != entry.problem:
                    absent.append(row)
            elif same[i] and status[i] == OK:
                self.result.known += 1
                if reasons[i] is not None:
                    back.append(entry.source)
            elif same[i] and status[i] == BROKEN and not self.retry:
                self.result.skipped.append(entry.row(reason=reasons[i]))
            else:
                fresh.append((entry, status[i] is None))
        self.cache.skip(absent, broken=False)
        if back:  # could not be reached once, and can again
            self.cache.commit(entries=[{**row, "reason": None} for row in self.cache.files_of(back)], what="back")
        moved = self._moved([entry for entry, new in fresh if new])
        return [entry for entry, _ in fresh if entry.source not in moved]

    def _join(self, entries: Sequence[Entry]) -> tuple[Any, np.ndarray]:
        """(rows of these files, and of each entry the place among them or −1)"""
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = ["source", "bytes", "modified", "status", "reason"]
        nowhere = np.full(len(entries), -1)
        if self.empty or not entries:
            return None, nowhere
        sources = [entry.source for entry in entries]
        if (seen := self.cache.seen(FILES, "source").may_have(sources)) is not None and not seen.any():
            return None, nowhere
        low, high, most = min(sources), max(sources), WIDER * len(entries) + MANY
        table = self.cache.table(FILES)
        query = table.search().where(f"source >= {quoted(low)} AND source <= {quoted(high)}").select(columns)
        with guarded(self.cache.path):
            rows = query.limit(most).to_arrow()
        if rows.num_rows == most:
            parts = [sources[at : at + MANY] for at in range(0, len(sources), MANY)]
            rows = pa.concat_tables(self.cache.rows(FILES, columns, one_of("source", part)) for part in parts)
        if not rows.num_rows:
            return rows, nowhere
        found = pc.index_in(pa.array(sources), value_set=rows["source"].combine_chunks())
        return rows, found.fill_null(-1).to_numpy(zero_copy_only=False)

    def _moved(self, entries: Sequence[Entry]) -> set[str]:
        """The sources of files that a folder which does not exist any more had: of the same id, size and time."""
        if self.empty or not entries:
            return set()
        if (seen := self.cache.seen(FILES, "id").may_have([entry.id for entry in entries])) is not None:
            entries = [entry for entry, known in zip(entries, seen, strict=True) if known]
        changes, gone = {}, {}
        for at in range(0, len(entries), MANY):
            part = {entry.id: entry for entry in entries[at : at + MANY]}
            condition = f"{one_of('id', list(part))} AND status = '{OK}'"
            for row in self.cache.rows(FILES, None, condition).to_pylist():
                entry = part[row["id"]]
                same = (row["bytes"], row["modified"]) == (entry.bytes, entry.modified)
                if same and entry.source not in changes and is_gone(row):
                    changes[entry.source] = {**row, **entry.row(), "reason": None}
                    gone[entry.source] = row["source"]
        if changes:
            self.cache.commit(entries=list(changes.values()), gone=list(gone.values()), what="move")
            self.result.known += len(changes)
        return set(changes)


def blocks_of(entries: Iterable[Entry], size: int = BLOCK) -> Iterator[list[Entry]]:
    stream = iter(entries)
    while block := list(islice(stream, size)):
        yield block


def is_gone(row: dict[str, Any]) -> bool:
    """Whether the file of a row is not there any more; of archives and buckets that is not looked up."""
    return is_local(row["source"]) and not os.path.isfile(row["root"]) and not os.path.lexists(row["source"])
