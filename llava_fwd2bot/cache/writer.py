"""The writing half of SummaryCache. A process that is killed leaves whole commits.

Summaries are committed before the files that name them. After a kill in between, the next run finds the content.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from .format import COMMITS, FILES, SUMMARIES, again, first_line, free, in_conflict, lock, of_engine, one_of
from .rows import file_rows, summary_rows
from .store import MANY
from .tables import BROKEN, INDEXED, KEYS, OK, users_columns

if TYPE_CHECKING:
    from torch import Tensor


class CacheWriter:
    """Changes a cache; see SummaryCache."""

    def add(self, ids: Sequence[str], summary: Tensor, embedding: Tensor, about: Sequence[dict[str, Any]]) -> None:
        """Adds images, or puts them in the place of those of the same path, in one commit.

        Args:
            summary: [N, k, D]. embedding: [N, D].
            about: of each image `source` (its whole path), sha256, bytes, modified, width, height.
        """
        if not len(ids):
            return
        tokens = self.codec.encode(summary.cpu()).numpy()  # [N, k, B]
        vectors = embedding.cpu().half().numpy()  # [N, D]
        sizes = [(row["width"], row["height"]) for row in about]
        entries = [
            {**row, "id": name, "root": root_of(row["source"], name)} for name, row in zip(ids, about, strict=True)
        ]
        self.commit(summary_rows(self.settings, [row["sha256"] for row in about], sizes, tokens, vectors), entries)

    def commit(
        self, summaries: Any = None, entries: Sequence[dict[str, Any]] = (), gone: Sequence[str] = (), what: str = "add"
    ) -> int:
        """Adds summaries that are not stored yet, and adds or replaces files.

        Args:
            summaries: a pyarrow table of `rows.summary_rows`; of one content the row that is there stays.
            entries: rows of `files`, see `rows.file_rows`.
            gone: sources of files to remove, such as the old paths of moved files.

        Returns:
            how many summaries are new.
        """
        added = 0
        with self.writing():
            if summaries is not None and summaries.num_rows:
                keys = summaries["sha256"].to_pylist()
                first = {key: i for i, key in reversed(list(enumerate(keys)))}
                if len(first) < len(keys):
                    summaries = summaries.take(sorted(first.values()))
                added = self._put(SUMMARIES, summaries, replace=False)
            if len(entries):
                schema = self.table(FILES).schema
                last = {entry["source"]: entry for entry in entries}
                if own := users_columns(schema):  # they stay, whatever becomes of the file
                    for row in self.files_of(list(last)):
                        last[row["source"]] = {**{name: row[name] for name in own}, **last[row["source"]]}
                self._put(FILES, file_rows(self.settings, list(last.values()), schema))
            for at in range(0, len(gone), MANY):
                self._delete(FILES, one_of("source", gone[at : at + MANY]))
            self.record(what)
        return added

    def skip(self, entries: Sequence[dict[str, Any]], broken: bool = True) -> None:
        """Records files that could not be used: of each source, id, reason, bytes, modified.

        Args:
            broken: they were read, and what the cache has of them is of no file any more. A file that cannot be
                reached may come back: its row stays, and gets the reason.
        """
        if not entries:
            return
        rows = [{"root": root_of(entry["source"], entry["id"]), **entry, "status": BROKEN} for entry in entries]
        if not broken:
            known = {row["source"]: row for row in self.files_of([row["source"] for row in rows])}
            rows = [
                {**known[row["source"]], "reason": row["reason"]}
                if known.get(row["source"], {}).get("status") == OK
                else row
                for row in rows
            ]
        self.commit(entries=rows, what="skip")

    def forget(self, sources: Sequence[str], what: str = "rm") -> None:
        """Removes files from the cache; their summaries stay until `optimize`."""
        if sources:
            self.commit(gone=list(sources), what=what)

    def put_files(self, rows: Any, what: str) -> None:
        """Commits rows of `files` (a pyarrow table with checksums) in the place of those of the same source."""
        with self.writing():
            self._merge(FILES, rows)
            self.record(what)

    def drop_rows(self, name: str, condition: str, what: str) -> None:
        with self.writing():
            self._delete(name, condition)
            self.record(what)

    # ------------------------------------------------------------------ parts
    def _put(self, name: str, rows: Any, replace: bool = True) -> int:
        """Adds rows; of a key that is there the row is replaced, or stays. Returns how many are new.

        Under the lock, rows whose keys are certainly new are appended, which takes as long in a large table as in a
        small one. Without a lock every row is merged by its key, by which LanceDB finds two writers of the same one.
        """
        known = self.seen(name).may_have(rows[KEYS[name]].to_pylist(), newest=True) if self.local else None
        if known is None:
            return self._merge(name, rows, replace)
        with self._noting(name, rows):
            added = self._merge(name, rows.filter(known), replace) if known.any() else 0
            fresh = rows.filter(~known)
            if fresh.num_rows:
                self.table(name).add(fresh)
        return added + fresh.num_rows

    @contextmanager
    def _noting(self, name: str, rows: Any = None) -> Iterator[None]:
        """Tells the hashes of a table's columns that what is committed within adds these rows and no others."""
        before = self.table(name).version
        yield
        if self.local:
            for seen in self.all_seen(name):
                seen.note(before, [] if rows is None else rows[seen.column].to_pylist())

    def _merge(self, name: str, rows: Any, replace: bool = True) -> int:
        table = self.table(name)

        def run() -> Any:
            table.checkout_latest()
            merge = table.merge_insert(KEYS[name])
            if replace:
                merge = merge.when_matched_update_all()
            return merge.when_not_matched_insert_all().execute(rows)

        return again(run).num_inserted_rows

    def _delete(self, name: str, condition: str) -> None:
        table = self.table(name)

        def run() -> None:
            table.checkout_latest()
            table.delete(condition)

        with self._noting(name):
            again(run)

    def record(self, what: str) -> None:
        """Versions and rows, as this process sees them; where there is no lock, of about this time."""
        row: dict[str, Any] = {"at": datetime.now(timezone.utc), "what": what}
        for name in (SUMMARIES, FILES):
            table = self.table(name)
            row |= {f"{name}_version": table.version, f"{name}_rows": table.count_rows()}
        import pyarrow as pa

        table = self.table(COMMITS)
        again(lambda: table.add(pa.Table.from_pylist([row], schema=table.schema)))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The lock, and OSError for whatever LanceDB raises within."""
        with lock(self.path):
            try:
                yield
            except BaseException as error:
                if not of_engine(error):
                    raise
                reason = f"The cache could not be written ({first_line(error)}); no image in it is changed"
                raise OSError(getattr(error, "errno", None) or errno.EIO, reason, self.path) from error

    def optimize(
        self, keep: timedelta, files_keep: timedelta | None = None, names: Sequence[str] = (FILES, SUMMARIES, COMMITS)
    ) -> bool:
        """Joins small files, takes new rows into the indexes, removes versions older than `keep`.

        Args:
            files_keep: another age for the small table of files, whose versions are the way back after `rm`.
            names: of the tables.

        Returns:
            False where it was left for another time: an index is being built, or, where there is no lock, others write.
        """
        idle = free(self.path, ".indexing")
        if idle is None:
            return False
        with idle, self.writing():
            for name in names:
                table = self.table(name)
                own = files_keep if name == FILES and files_keep is not None else keep
                try:
                    with self._noting(name):
                        again(lambda table=table, own=own: _optimize(table, own), times=5)
                except (RuntimeError, OSError) as error:
                    if self.local or not in_conflict(error):
                        raise
                    return False
            self.record("optimize")
        return True

    def index_keys(self, name: str, most: int) -> None:
        """Builds the indexes of a table's keys anew that lack more than `most` rows; joins no files."""
        from lancedb.index import BTree

        idle = free(self.path, ".indexing")
        if idle is None:
            return
        with idle, self.writing():
            table = self.table(name)
            for index in table.list_indices():
                if index.columns[0] in INDEXED[name] and table.index_stats(index.name).num_unindexed_rows > most:
                    again(lambda index=index: table.create_index(index.columns[0], config=BTree(), replace=True))


def _optimize(table: Any, keep: timedelta) -> None:
    try:
        table.optimize(cleanup_older_than=keep)
    except (RuntimeError, OSError) as error:
        if "space" not in str(error).lower():  # "No space left on device"
            raise
        # LanceDB joins files before it removes old ones; the library below it can remove alone
        try:
            table.cleanup_old_versions(keep)
        except ImportError:
            reason = "there is no room to join files; with `pip install pylance` old versions are removed first"
            raise OSError(errno.ENOSPC, reason) from error
        table.optimize(cleanup_older_than=keep)


def root_of(source: str, name: str) -> str:
    """The folder whose image `name` is the file `source`."""
    if source.endswith("/" + name):
        return source[: -len(name) - 1] or "/"
    return str(PurePosixPath(source).parent)


def prefixes(keys: Sequence[str]) -> np.ndarray:
    """The first 64 bits of SHA-256 in hexadecimal, uint64 [N]; what is no such number is 0."""
    found = np.zeros(len(keys), np.uint64)
    for i, key in enumerate(keys):
        try:
            found[i] = int(key[:16], 16)
        except (TypeError, ValueError):
            pass
    return found
