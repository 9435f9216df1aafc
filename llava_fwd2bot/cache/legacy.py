"""Reads caches of format 1, in which a row was named by its path and held its own tensors; migrate.py converts them.

Their tables are `images` and `skipped`. A row has one checksum over all its tokens, so that reading a prefix reads all
of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .format import (
    OLD_TABLES,
    CacheSettings,
    DamagedCache,
    blocks,
    guarded,
    is_local,
    lancedb_module,
    one_of,
)
from .naming import unknown_id
from .nearest import filter_error
from .rows import decoded, tokens_in, vectors_in
from .tables import checked_settings, settings_in

if TYPE_CHECKING:
    from torch import Tensor

OLD_ABOUT = ("id", "sha256", "source", "bytes", "modified", "width", "height", "added")
_COLUMNS = OLD_ABOUT[:-1]


class OldCache:
    """The reading half of SummaryCache, over format 1."""

    def __init__(self, path: str, database: Any, settings: CacheSettings) -> None:
        self.path, self.settings = path, settings
        self.blocks = blocks(settings.k)
        with guarded(path):
            self.images, self._skipped = (database.open_table(name) for name in OLD_TABLES)

    @classmethod
    def open(cls, path: str, fingerprint: str | None = None) -> OldCache:
        database = lancedb_module().connect(path)
        with guarded(path):
            table = database.open_table(OLD_TABLES[0])
        return cls(path, database, checked_settings(path, settings_in(table, path), fingerprint))

    @property
    def local(self) -> bool:
        return is_local(self.path)

    def __len__(self) -> int:
        return self.images.count_rows()

    def about(self, columns: Sequence[str] = OLD_ABOUT, where: str | None = None) -> list[dict[str, Any]]:
        return self._rows(list(columns), where).to_pylist()

    def skipped(self) -> list[dict[str, Any]]:
        with guarded(self.path):
            return self._skipped.search().limit(None).to_arrow().to_pylist()

    def get(self, ids: Sequence[str], k: int | None = None) -> Tensor:
        """See SummaryCache.get; the whole row is read, as its checksum covers it."""
        import torch

        most = self.settings.k
        k = most if k is None else k
        if not 1 <= k <= most:
            raise ValueError(f"{self.path} holds {most} tokens per image, but --k asks for {k}.")
        if not len(ids):
            return torch.empty(0, k, self.settings.size)
        rows = self._rows(None, one_of("id", list(dict.fromkeys(ids))))
        place = {name: i for i, name in enumerate(rows["id"].to_pylist())}
        for name in ids:
            if name not in place:
                known = [row["id"] for row in self.about(["id"])]
                raise ValueError(unknown_id(Path(self.path), name, known or [""], self.skipped()))
        if (wrong := self.wrong(rows)).any():
            names = [name for name, i in place.items() if wrong[i]]
            raise DamagedCache(f"{self.path} is damaged at {', '.join(names[:3])}.")
        tokens = tokens_in(self.settings, rows, self.blocks)[[place[name] for name in ids]]
        return decoded(self.settings, tokens)[:, :k]

    def search(
        self,
        vector: Tensor,
        top: int = 10,
        where: str | None = None,
        exact: bool | None = None,
        columns: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """See SummaryCache.search; columns that format 1 does not have are None."""
        query = self.images.search(vector.detach().cpu().half().numpy(), vector_column_name="embedding")
        own = [name for name in dict.fromkeys(("id", *columns)) if name in OLD_ABOUT]
        query = query.distance_type("cosine").limit(top).select([*own, "_distance"])
        if where is not None:
            query = query.where(f"({where})", prefilter=True)
        query = query.bypass_vector_index() if exact else query.nprobes(20).refine_factor(2)
        with filter_error(where, OLD_ABOUT), guarded(self.path):
            rows = query.to_list()
        return [{**{n: row.get(n) for n in ("id", *columns)}, "score": 1 - row["_distance"]} for row in rows]

    def wrong(self, rows: Any) -> np.ndarray:
        """Which rows (all columns) are not what was written, bool [N]."""
        tokens, vectors = tokens_in(self.settings, rows, self.blocks), vectors_in(rows)
        values = zip(*(rows[name].to_pylist() for name in _COLUMNS), strict=True)
        found = []
        for data, vector, names in zip(tokens, vectors, values, strict=True):
            start = zlib.crc32(vector.astype("<f2").tobytes(), zlib.crc32(np.ascontiguousarray(data)))
            found.append(zlib.crc32("\0".join(map(str, names)).encode(), start))
        return np.array(found, np.int64) != rows["crc32"].to_numpy()

    def batches(self, size: int = 1024) -> Iterator[Any]:
        import pyarrow as pa

        stream = self.images.search().limit(None).to_batches(size)
        while True:
            with guarded(self.path):
                batch = next(stream, None)
            if batch is None:
                return
            yield pa.Table.from_batches([batch])

    def _rows(self, columns: list[str] | None, where: str | None) -> Any:
        query = self.images.search().limit(None)
        if columns is not None:
            query = query.select(columns)
        if where is not None:
            query = query.where(where)
        with guarded(self.path):
            return query.to_arrow()
