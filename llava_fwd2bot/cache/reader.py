"""SummaryCache: the summaries of a collection of images, on disk, for search and for answers; a LanceDB database.

Two tables: `images` (a row per image) and `skipped` (files that could not be used, and why). What the cache was made
with is in the schema's metadata. A commit is one new version of a table, written beside and then named, so that a
process that is killed leaves what was there. Summaries lie in columns of 1, 1, 2, 4, 8, … tokens: the first j
tokens of an image are the first columns, and reading fewer tokens reads fewer bytes.

LanceDB was chosen by measuring (eval/results/cache.md): embedded, transactional, columns, a vector index over the same
rows, and object storage by the same code.

Shapes: N images, k summary tokens, D hidden size, B bytes of an encoded token.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..version import __version__
from .codecs import get_codec
from .format import (
    ABOUT,
    EXACT_BELOW,
    FORMAT,
    IMAGES,
    PROBES,
    REFINED,
    SETTINGS,
    SKIPPED,
    TOLD,
    CacheSettings,
    about_fields,
    asked,
    blocks,
    clear_unfinished,
    column,
    crc32,
    first_line,
    is_cache,
    is_local,
    lancedb_module,
    lock,
    one_of,
    skipped_schema,
    writable,
)
from .writer import CacheWriter


class SummaryCache(CacheWriter):
    """Open or make one by `SummaryCache.open` and `SummaryCache.create`.

    Every method sees what other processes have committed. Local caches may have many writers, of any number of
    processes on one machine; on object storage, LanceDB's own rules hold.
    """

    def __init__(self, path: str, database: Any, settings: CacheSettings) -> None:
        self.path, self.settings = path, settings
        self.codec, self.blocks = get_codec(settings.codec), blocks(settings.k)
        self._images, self._skipped = database.open_table(IMAGES), database.open_table(SKIPPED)

    # ------------------------------------------------------------------ opening
    @classmethod
    def create(cls, path: str | os.PathLike, settings: CacheSettings) -> SummaryCache:
        """A new cache; one that is there already with the same settings is opened, so that many may call it at once.

        Raises:
            ValueError: a cache of other settings, or something else, is there.
            OSError: the folder cannot be written.
        """
        lancedb = lancedb_module()
        import pyarrow as pa

        text = os.fspath(path)
        if is_local(text):
            try:
                Path(text).mkdir(parents=True, exist_ok=True)
                writable(Path(text))
            except OSError as error:
                raise OSError(error.errno, f"The cache cannot be written ({error.strerror})", text) from error
        with lock(text):
            if not is_cache(text):
                clear_unfinished(text)
                codec = get_codec(settings.codec)
                token = codec.bytes_per_token(settings.size)
                stored = [(column(b), pa.binary((b[1] - b[0]) * token)) for b in blocks(settings.k)]
                fields = [("id", pa.string()), *about_fields(), ("crc32", pa.int64())]
                fields += [("embedding", pa.list_(pa.float16(), settings.size)), *stored]
                meta = {SETTINGS: json.dumps(asdict(settings)).encode()}
                database = lancedb.connect(text)
                database.create_table(SKIPPED, schema=skipped_schema(), exist_ok=True)
                database.create_table(IMAGES, schema=pa.schema(fields, metadata=meta))  # last: with it, it is a cache
        cache = cls.open(text, settings.fingerprint)
        for name in ("k", "size", "codec", "pooling", "quantised", "exif_orientation", "transparency"):
            ours, theirs = getattr(cache.settings, name), getattr(settings, name)
            if ours != theirs:
                raise ValueError(
                    f"{text} has {name} = {ours or 'no'}, but {theirs or 'no'} was asked "
                    "for. Go on with the same, or choose another --cache."
                )
        return cache

    @classmethod
    def open(cls, path: str | os.PathLike, fingerprint: str | None = None) -> SummaryCache:
        """The cache at `path`.

        Args:
            fingerprint: of the model that will read it; None where nothing is decoded by a model.

        Raises:
            FileNotFoundError, ValueError: there is none, it is no cache, of a later version, or of another model.
        """
        lancedb = lancedb_module()
        text = os.fspath(path)
        if is_local(text) and not Path(text).exists():
            raise FileNotFoundError(errno.ENOENT, "There is no such cache", text)
        if not is_cache(text):
            raise ValueError(f"{text} is not a cache: make one by `fwd2bot compress --images … --cache {text}`.")
        database = lancedb.connect(text)
        try:
            meta = database.open_table(IMAGES).schema.metadata or {}
            values = json.loads(meta[SETTINGS])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{text} is a LanceDB database, but not a cache of summaries.") from error
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(
                f"{text} cannot be opened ({first_line(error)}): is a file of it missing or cut?"
            ) from error
        try:
            settings = CacheSettings(**values)
        except TypeError:  # a setting that this version does not know
            settings = None
        if settings is None or settings.format > FORMAT:
            raise ValueError(
                f"{text} was made by llava_fwd2bot {values.get('version')}, in a format that {__version__} does not "
                "know: upgrade llava_fwd2bot."
            )
        if fingerprint is not None and settings.fingerprint != fingerprint:
            raise ValueError(
                f"{text} was made with another model ({settings.model or settings.fingerprint[:12]}): summaries are "
                "read only by the model that made them. Name that one by --model, or choose another --cache."
            )
        return cls(text, database, settings)

    @property
    def local(self) -> bool:
        return is_local(self.path)

    # ------------------------------------------------------------------ reading
    def table(self) -> Any:
        """LanceDB's table of the images, at its newest version."""
        return self._fresh(self._images)

    def __len__(self) -> int:
        return self.table().count_rows()

    def about(self, columns: Sequence[str] = ("id", *ABOUT), where: str | None = None) -> list[dict[str, Any]]:
        """The metadata of all rows, or of those that an SQL condition picks."""
        return self._rows(list(columns), where).to_pylist()

    def skipped(self) -> list[dict[str, Any]]:
        """The files that could not be used: id, reason, and the file as it was."""
        return self._fresh(self._skipped).search().limit(None).to_arrow().to_pylist()

    def get(self, ids: Sequence[str], k: int | None = None) -> Tensor:
        """The first k summary tokens of `ids`, in their order, [M, k, D] float32.

        Raises:
            ValueError: an id is not there, k is more than is stored, or a row is damaged (read in full alone).
        """
        most = self.settings.k
        k = most if k is None else k
        if not len(ids):
            return torch.empty(0, k, self.settings.size)
        if not 1 <= k <= most:
            raise ValueError(f"{self.path} holds {most} tokens per image, but --k asks for {k}.")
        wanted = list(dict.fromkeys(ids))
        names = [column(b) for b in self.blocks if b[0] < k]
        extra = ["crc32", "embedding", *TOLD[1:]] if k == most else []
        found = self._rows(["id", *names, *extra], one_of("id", wanted))
        place = {name: i for i, name in enumerate(found["id"].to_pylist())}
        for name in wanted:
            if name not in place:
                from .summary_file import unknown_id

                known = [row["id"] for row in self.about(["id"])]
                raise ValueError(unknown_id(Path(self.path), name, known or [""], self.skipped()))
        data = self.tokens(found, names)  # [found, ≥ k, B]
        if extra:
            self.check(found, data)
        rows = torch.tensor([place[name] for name in ids])
        return self.codec.decode(data[rows][:, :k].contiguous(), self.settings.size)

    def search(
        self,
        vector: Tensor,
        top: int = 10,
        where: str | None = None,
        exact: bool | None = None,
        columns: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """The rows nearest to a unit vector [D], best first: their `id`, `score` (the cosine), and `columns`.

        Args:
            where: an SQL condition on the metadata columns, e.g. "width > 1000 AND id LIKE 'beach/%'".
            exact: compare with every row; default: where there are at most EXACT_BELOW, or no index.
            columns: of the metadata, e.g. "source" or all of ABOUT; each is read from its own place in the files, and
                all of them take longer than the search itself.

        Raises:
            ValueError: the condition does not parse, or a column is not there.
        """
        if unknown := set(columns) - {*ABOUT}:
            raise ValueError(f"There is no column {', '.join(sorted(unknown))}; there are {', '.join(ABOUT)}.")
        table = self.table()
        query = table.search(vector.detach().cpu().to(torch.float16).numpy(), vector_column_name="embedding")
        query = query.distance_type("cosine").limit(top).select(["id", *columns, "_distance"])
        if where is not None:
            # in brackets: the parser takes the longest condition that it understands, and drops what follows
            query = query.where(f"({where})", prefilter=True)
        if exact or (exact is None and table.count_rows() <= EXACT_BELOW):
            query = query.bypass_vector_index()
        else:
            query = query.nprobes(PROBES).refine_factor(max(2, -(-REFINED // max(1, top))))
        rows = asked(query.to_arrow, where, table)
        return [{**{n: row[n] for n in ("id", *columns)}, "score": 1 - row["_distance"]} for row in rows.to_pylist()]

    # ------------------------------------------------------------------ parts
    @staticmethod
    def _fresh(table: Any) -> Any:
        table.checkout_latest()
        return table

    def _rows(self, columns: list[str], where: str | None) -> Any:
        table = self.table()
        query = table.search().select(columns).limit(None)
        if where is not None:
            query = query.where(where)
        return asked(query.to_arrow, None, table)

    def tokens(self, rows: Any, names: Sequence[str]) -> Tensor:
        """The encoded tokens of some columns, [rows, tokens, B]."""
        token, parts = self.codec.bytes_per_token(self.settings.size), []
        for name in names:
            flat = np.frombuffer(b"".join(rows[name].to_pylist()), np.uint8)
            parts.append(flat.reshape(rows.num_rows, -1, token))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def vectors(self, rows: Any) -> np.ndarray:
        return rows["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)

    def check(self, rows: Any, data: Tensor) -> None:
        wrong = self.damaged(rows, data)
        if wrong:
            raise ValueError(
                f"{self.path} is damaged at {', '.join(wrong[:3])}: run `fwd2bot cache verify {self.path}`."
            )

    def damaged(self, rows: Any, data: Tensor) -> list[str]:
        """The ids of rows whose bytes are not those that were written."""
        told = zip(rows["id"].to_pylist(), self._sums(rows, data), rows["crc32"].to_pylist(), strict=True)
        return [name for name, found, written in told if found != written]

    def _sums(self, rows: Any, data: Tensor) -> list[int]:
        told = zip(*(rows[name].to_pylist() for name in TOLD), strict=True)
        return [crc32(d, v, t) for d, v, t in zip(data.numpy(), self.vectors(rows), told, strict=True)]
