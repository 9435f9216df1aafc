"""The base of the reader and the writer: the tables of a cache, and rows of them, by a condition or in batches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from .format import FILES, SUMMARIES, CacheSettings, DamagedCache, blocks, guarded, is_local, one_of
from .rows import wrong_summaries
from .seen import Seen
from .sizes import bytes_per_token
from .tables import ABOUT, KEYS, LOST, OK, users_columns

MANY = 1000  # names in one condition
SETTLED = 100_000_000  # ns after which the time of a folder's last change is its own


class CacheStore:
    """The tables of an open cache; see reader.SummaryCache."""

    def __init__(self, path: str, tables: dict[str, Any], settings: CacheSettings) -> None:
        self.path, self.settings = path, settings
        self.blocks = blocks(settings.k)
        self._tables = tables
        self.last_filter: Any = None  # nearest.Filter
        self._states: dict[str, tuple[int, int] | None] = {}
        self._seen = {
            (SUMMARIES, "sha256"): Seen(self, SUMMARIES, "sha256"),
            (FILES, "source"): Seen(self, FILES, "source"),
            (FILES, "id"): Seen(self, FILES, "id"),
        }

    @cached_property
    def codec(self) -> Any:
        from .codecs import get_codec  # late, as whatever decodes nothing need not wait for torch

        return get_codec(self.settings.codec)

    @property
    def bytes_of_row(self) -> int:
        """Bytes of a row of `summaries` on disk, about: tokens, vector, key and checksums."""
        size = self.settings.size
        return self.settings.k * bytes_per_token(self.settings.codec, size) + 2 * size + 128

    def seen(self, name: str, column: str | None = None) -> Seen:
        """The hashes of a column of a table, by default of its key, that tell what is certainly not in it."""
        return self._seen[name, column or KEYS[name]]

    def all_seen(self, name: str) -> list[Seen]:
        """Those of all columns of a table; of the commits there are none."""
        return [seen for (table, _), seen in self._seen.items() if table == name]

    @property
    def local(self) -> bool:
        return is_local(self.path)

    def table(self, name: str = SUMMARIES) -> Any:
        """LanceDB's table, at its newest version."""
        table = self._tables[name]
        with guarded(self.path):
            table.checkout_latest()
        return table

    def version(self, name: str, newest: bool = False) -> int:
        """The newest version of a table, as far as the folder of its versions shows, which is quick to ask.

        LanceDB lists all versions to find the newest. Where a file system shows changes late, so does this, unless
        `newest` asks LanceDB in any case.
        """
        before = self._states.get(name)
        state = _state_of(self.path, name) if self.local and not newest else None
        if state is not None and before is not None and before[0] == state:
            return before[1]
        found = self.table(name).version
        # a change within the clock's step after the last one does not show: such a state is not relied on
        settled = state is not None and time.time_ns() - state > SETTLED
        self._states[name] = (state, found) if settled else None
        return found

    @property
    def users_columns(self) -> list[str]:
        """The columns that users have added to what is known of files."""
        return users_columns(self.table(FILES).schema)

    def __len__(self) -> int:
        """Images with a summary."""
        with guarded(self.path):
            return self.table(FILES).count_rows(f"status = '{OK}'")

    def about(self, columns: Sequence[str] = ABOUT, where: str | None = None) -> list[dict[str, Any]]:
        """What is known of all images with a summary, or of those that an SQL condition picks."""
        condition = f"status = '{OK}'" + (f" AND ({where})" if where else "")
        return self.rows(FILES, list(columns), condition).to_pylist()

    def skipped(self) -> list[dict[str, Any]]:
        """The files that could not be used, or not be reached: id, source, reason, and the file as it was."""
        columns = ["id", "source", "status", "reason", "bytes", "modified"]
        return self.rows(FILES, columns, "reason IS NOT NULL").to_pylist()

    def rows_lost(self) -> list[dict[str, Any]]:
        """The files whose summary was damaged or removed, and that are to be compressed again."""
        return self.rows(FILES, ["root", "id", "source"], f"status = '{LOST}'").to_pylist()

    def files_of(self, sources: Sequence[str]) -> list[dict[str, Any]]:
        """All columns of the files of these whole paths that are known; not in their order."""
        found = []
        for at in range(0, len(sources), MANY):
            rows = self.rows(FILES, None, one_of("source", sources[at : at + MANY]))
            found += rows.to_pylist()
        return found

    def has(self, keys: Sequence[str]) -> dict[str, tuple[int, int]]:
        """{SHA-256: (width, height)} of those contents that some file has, with a summary.

        It asks the table of files: its rows are small, so that its index is brought up to date often. Where there are
        more summaries than files, of a run that was killed or of files that were taken out, it asks that table, too.
        """
        keys = list(dict.fromkeys(keys))
        if (seen := self.seen(SUMMARIES).may_have(keys)) is not None:
            keys = [key for key, known in zip(keys, seen, strict=True) if known]
        if not keys:
            return {}
        condition = f"{one_of('sha256', keys)} AND status = '{OK}'"
        names = ["sha256", "width", "height"]
        rows = self.rows(FILES, names, condition).to_pylist()
        found = {row["sha256"]: (row["width"], row["height"]) for row in rows}
        rest = [key for key in keys if key not in found]
        if rest and self._more_summaries():
            rows = self.rows(SUMMARIES, names, one_of("sha256", rest)).to_pylist()
            found |= {row["sha256"]: (row["width"], row["height"]) for row in rows}
        return found

    def _more_summaries(self) -> bool:
        with guarded(self.path):
            return self.table(SUMMARIES).count_rows() > self.table(FILES).count_rows()

    def stored(self, keys: Sequence[str]) -> set[str]:
        """Those contents whose summaries are there, whether or not a file has them."""
        return set(self.rows(SUMMARIES, ["sha256"], one_of("sha256", list(dict.fromkeys(keys))))["sha256"].to_pylist())

    def rows(self, name: str, columns: list[str] | None = None, where: str | None = None) -> Any:
        """Rows of a table that a condition picks, as a pyarrow table; all columns where `columns` is None."""
        query = self.table(name).search().limit(None)
        if columns is not None:
            query = query.select(columns)
        if where is not None:
            query = query.where(where)
        with guarded(self.path):
            rows = query.to_arrow()
            rows.validate(full=True)  # text that is damaged may not be UTF-8
            return rows

    def batches(self, name: str, columns: list[str] | None = None, size: int = 4096) -> Iterator[Any]:
        """All rows of one version of a table as pyarrow tables of up to `size` rows."""
        import pyarrow as pa

        query = self.table(name).search().limit(None)
        if columns is not None:
            query = query.select(columns)
        with guarded(self.path):
            stream = query.to_batches(size)
        while True:
            with guarded(self.path):
                batch = next(stream, None)
                if batch is not None:
                    batch.validate(full=True)
            if batch is None:
                return
            yield pa.Table.from_batches([batch])

    def check(self, rows: Any) -> None:
        """DamagedCache where a whole row of `summaries` is not what was written."""
        wrong = wrong_summaries(self.settings, rows, self.blocks)
        if wrong.any():
            raise self.damaged([f"content {rows['sha256'][int(i)].as_py()}" for i in wrong.nonzero()[0]])

    def damaged(self, names: Sequence[str]) -> DamagedCache:
        return DamagedCache(
            f"{self.path} is damaged at {', '.join(names[:3])}: run `fwd2bot cache repair {self.path}`."
        )


def _state_of(path: str, name: str) -> int | None:
    """When a version of a local table was last added or removed, ns; None where the folder cannot be read."""
    try:
        return os.stat(os.path.join(path, f"{name}.lance", "_versions")).st_mtime_ns
    except OSError:
        return None
