"""What changes a SummaryCache: every method is one commit, and a process that is killed in it leaves what was there.

Shapes: N images, k summary tokens, D hidden size, B bytes of an encoded token.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .format import TOLD, about_fields, column, crc32, first_line, lock, one_of, skipped_schema


class CacheWriter:
    """The half of SummaryCache that writes."""

    def add(self, ids: Sequence[str], summary: Tensor, embedding: Tensor, about: Sequence[dict[str, Any]]) -> None:
        """Adds images, or puts them in the place of those of the same id, in one commit.

        Args:
            summary: [N, k, D]. embedding: [N, D]. about: of each image what ABOUT names; "added" is filled in.
        """
        import pyarrow as pa

        if not len(ids):
            return
        data = self.codec.encode(summary.cpu())  # [N, k, B]
        vectors = embedding.cpu().to(torch.float16).numpy()  # [N, D]
        now = datetime.now(timezone.utc)
        columns: dict[str, Any] = {"id": pa.array(list(ids), pa.string())}
        for name, kind in about_fields():
            columns[name] = pa.array([now if name == "added" else row[name] for row in about], kind)
        told = [[name, *(row[n] for n in TOLD[1:])] for name, row in zip(ids, about, strict=True)]
        sums = [crc32(d, v, t) for d, v, t in zip(data.numpy(), vectors, told, strict=True)]
        columns["crc32"] = pa.array(sums, pa.int64())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.settings.size)
        for b in self.blocks:
            part = np.ascontiguousarray(data[:, b[0] : b[1]].numpy())
            kind = pa.binary(part[0].size)
            columns[column(b)] = pa.FixedSizeBinaryArray.from_buffers(kind, len(ids), [None, pa.py_buffer(part)])
        self.put(pa.table(columns, schema=self._images.schema))

    def put(self, rows: Any, gone: Sequence[str] = ()) -> None:
        """Commits rows of the images table (a pyarrow table); of rows with the same id the new one stays.

        Args:
            gone: ids that the new rows replace under other names.
        """
        with self._writing() as (images, skipped):
            names = rows["id"].to_pylist()
            if skipped.count_rows():  # first: killed in between, the image is in neither and comes again
                skipped.delete(one_of("id", names))
            if not self.local or self._rows(["id"], one_of("id", names)).num_rows:
                images.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
            else:
                images.add(rows)
            gone = sorted(set(gone) - set(names))
            if gone:  # last: killed in between, both names are there
                images.delete(one_of("id", gone))

    def skip(self, entries: Sequence[dict[str, Any]], broken: bool = True) -> None:
        """Records files that could not be used: of each id, reason, source, bytes, modified.

        Args:
            broken: they were read, and what the cache has of them is of no file any more. A file that cannot be
                reached may come back: its row stays.
        """
        import pyarrow as pa

        if not entries:
            return
        rows = [{name: entry.get(name) for name in skipped_schema().names} for entry in entries]
        table = pa.Table.from_pylist(rows, schema=skipped_schema())
        with self._writing() as (images, skipped):
            if broken:
                images.delete(one_of("id", table["id"].to_pylist()))
            skipped.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def adopt(self, found: Sequence[tuple[str, str, dict[str, Any]]], gone: Sequence[str] = ()) -> None:
        """The same contents under other names, in one commit: (id that is there, new id, what ABOUT names of it).

        Args:
            gone: ids that were moved from; they are no more.
        """
        if not found:
            return
        rows = self._rows(self._images.schema.names, one_of("id", sorted({old for old, _, _ in found})))
        place = {name: i for i, name in enumerate(rows["id"].to_pylist())}
        found = [(old, new, about) for old, new, about in found if old in place]  # else: removed by another process
        rows = rows.take([place[old] for old, _, _ in found])
        rows = self._replaced(rows, "id", [new for _, new, _ in found])
        for name in ("source", "bytes", "modified"):
            rows = self._replaced(rows, name, [about[name] for *_, about in found])
        sums = self._sums(rows, self.tokens(rows, [column(b) for b in self.blocks]))
        self.put(self._replaced(rows, "crc32", sums), gone)

    def forget(self, ids: Sequence[str]) -> None:
        """Removes images, and skipped files, from the cache."""
        if ids:
            with self._writing() as (images, skipped):
                for table in (images, skipped):
                    table.delete(one_of("id", ids))

    @staticmethod
    def _replaced(rows: Any, name: str, values: list[Any]) -> Any:
        import pyarrow as pa

        at = rows.schema.get_field_index(name)
        return rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))

    @contextmanager
    def _writing(self) -> Iterator[tuple[Any, Any]]:
        with lock(self.path):
            try:
                yield self.table(), self._fresh(self._skipped)
            except (RuntimeError, OSError) as error:
                reason = f"The cache could not be written ({first_line(error)}); no image in it is changed"
                raise OSError(getattr(error, "errno", None) or errno.EIO, reason, self.path) from error

    def optimize(self, keep: timedelta) -> None:
        """Joins small files and removes versions older than `keep`; a reader of such a version would lose it."""
        with self._writing() as (images, skipped):
            for table in (images, skipped):
                table.optimize(cleanup_older_than=keep)

    def build_index(self, partitions: int) -> None:
        with self._writing() as (images, _):
            from lancedb.index import HnswSq

            kind = HnswSq(distance_type="cosine", num_partitions=partitions)
            images.create_index("embedding", config=kind, replace=True)
