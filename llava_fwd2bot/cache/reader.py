"""SummaryCache: the summaries of a collection of images, on disk, for search and for answers; a LanceDB database.

`format.py` says what it is made of, `tables.py` its columns. An image is named by its path below the folder that was
given, or by its whole path where two folders have the same name in them. A commit is one new version of a table,
which LanceDB names once it is written, so that a killed process leaves the version before. Summaries lie in columns of
1, 1, 2, 4, 8, … tokens, each with a checksum: reading fewer tokens reads fewer bytes, and all that is read is checked.

LanceDB was chosen by measuring (eval/results/cache.md): embedded, transactional, columns, a vector index over the same
rows, and object storage by the same code.

Shapes: N images, k summary tokens, D hidden size, B bytes of an encoded token.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .format import (
    FILES,
    FORMAT,
    OLD_TABLES,
    SUMMARIES,
    TABLES,
    CacheSettings,
    DamagedCache,
    clear_unfinished,
    column,
    is_cache,
    is_local,
    lancedb_module,
    lock,
    one_of,
    tables_of,
    writable,
)
from .legacy import OldCache
from .naming import unknown_id
from .nearest import nearest
from .rows import decoded, tokens_in, wrong_files, wrong_summaries
from .store import MANY, CacheStore
from .tables import OK, checked_settings, create_tables, open_tables, settings_in
from .writer import CacheWriter

if TYPE_CHECKING:
    from torch import Tensor


class SummaryCache(CacheStore, CacheWriter):
    """Open or make one by `SummaryCache.open` and `SummaryCache.create`.

    Every method sees what other processes have committed. Caches may have many writers, of any number of processes:
    on one machine they take turns by a lock, on object storage by LanceDB's commits.
    """

    # ------------------------------------------------------------------ opening
    @classmethod
    def create(cls, path: str | os.PathLike, settings: CacheSettings) -> SummaryCache:
        """A new cache; one that is there already with the same settings is opened, so that many may call it at once.

        Raises:
            ValueError: a cache of other settings or of an earlier format, or something else, is there.
            OSError: the folder cannot be written.
        """
        lancedb_module()  # before anything else: its error names the extra
        text = os.fspath(path)
        if is_local(text):
            if Path(text).is_file():
                raise NotADirectoryError(errno.ENOTDIR, "A cache is a folder, and this is a file: choose another", text)
            try:
                Path(text).mkdir(parents=True, exist_ok=True)
                writable(Path(text))
            except OSError as error:
                raise OSError(
                    error.errno, f"The cache cannot be written ({error.strerror}): choose another place", text
                ) from error
        with lock(text):
            if not is_cache(text):
                clear_unfinished(text)
                create_tables(text, settings)
        cache = cls.open(text, settings.fingerprint)
        if cache.settings.format < FORMAT:
            raise ValueError(
                f"{text} is of an earlier format, which is read but not added to: run `fwd2bot cache migrate {text}`."
            )
        if name := cache.settings.differs(settings):
            ours, theirs = getattr(cache.settings, name), getattr(settings, name)
            raise ValueError(
                f"{text} has {name} = {ours or 'no'}, but {theirs or 'no'} was asked "
                "for. Go on with the same, or choose another --cache."
            )
        return cache

    @classmethod
    def open(cls, path: str | os.PathLike, fingerprint: str | None = None) -> SummaryCache:
        """The cache at `path`; one of an earlier format can be read.

        Args:
            fingerprint: of the model that will read it; None where nothing is decoded by a model.

        Raises:
            FileNotFoundError, ValueError: there is none, it is no cache, of a later version, or of another model.
        """
        lancedb_module()
        text = os.fspath(path)
        if is_local(text) and not Path(text).exists():
            raise FileNotFoundError(errno.ENOENT, "There is no such cache (`fwd2bot compress --cache` makes one)", text)
        there = tables_of(text)
        if not there.issuperset(TABLES):
            if there.issuperset(OLD_TABLES):
                return OldCache.open(text, fingerprint)
            if is_local(text) and any(next(Path(text).glob(f"{name}.lance/data/*"), None) for name in TABLES):
                lost = ", ".join(sorted({*TABLES} - there))
                raise DamagedCache(f"{text} has lost its table {lost}: `fwd2bot cache repair {text}` mends it.")
            raise ValueError(f"{text} is not a cache: name one that `fwd2bot compress --images … --cache PATH` made.")
        tables = open_tables(text)
        settings = checked_settings(text, settings_in(tables[SUMMARIES], text), fingerprint)
        return cls(text, tables, settings)

    # ------------------------------------------------------------------ reading
    def named(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of `files` that `names`, ids or whole paths, stand for, in their order.

        Raises:
            ValueError: one is not there, or stands for images of several folders.
            DamagedCache: the row of a file is not what was written.
        """
        wanted, by_name = list(dict.fromkeys(names)), {}
        for at in range(0, len(wanted), MANY):
            some = wanted[at : at + MANY]
            condition = f"({one_of('id', some)} OR {one_of('source', some)}) AND status = '{OK}'"
            rows = self.rows(FILES, None, condition)
            wrong = wrong_files(rows) if rows.num_rows else ()
            for row, bad in zip(rows.to_pylist(), wrong, strict=True):
                row["damaged"] = bool(bad)
                by_name.setdefault(row["source"], []).append(row)
                if row["id"] != row["source"]:
                    by_name.setdefault(row["id"], []).append(row)
        for name in wanted:
            self._one(name, by_name.get(name, []))
        if bad := [name for name in wanted if by_name[name][0]["damaged"]]:
            raise self.damaged(bad)
        return [by_name[name][0] for name in names]

    def _one(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            known = [row["id"] for row in self.about(["id"])]
            raise ValueError(unknown_id(Path(self.path), name, known or [""], self.skipped()))
        own = [row for row in rows if row["source"] == name]
        if own:
            rows[:] = own
        elif len({row["sha256"] for row in rows}) > 1:
            sources = ", ".join(sorted(row["source"] for row in rows)[:5])
            raise ValueError(f"{name} stands for {len(rows)} images of {self.path}: say which, {sources}")

    def get(self, ids: Sequence[str], k: int | None = None) -> Tensor:
        """The first k summary tokens of `ids`, in their order, [M, k, D] float32.

        Raises:
            ValueError: an id is not there, k is more than is stored, or a row is damaged.
        """
        import torch

        most = self.settings.k
        k = most if k is None else k
        if not len(ids):
            return torch.empty(0, k, self.settings.size)
        if not 1 <= k <= most:
            raise ValueError(f"{self.path} holds {most} tokens per image, but --k asks for {k}.")
        keys = [row["sha256"] for row in self.named(ids)]
        found, names = self.read(keys, k), list(ids)
        if lost := [name for name, key in zip(names, keys, strict=True) if key not in found]:
            raise self.damaged(lost)
        return torch.stack([found[key] for key in keys])

    def read(self, keys: Sequence[str], k: int) -> dict[str, Tensor]:
        """{SHA-256: the first k tokens [k, D]} of those contents that are there and whole."""
        wanted, found = list(dict.fromkeys(keys)), {}
        parts = [b for b in self.blocks if b[0] < k]
        names = ["sha256", "sums", *map(column, parts)]
        for at in range(0, len(wanted), MANY):
            rows = self.rows(SUMMARIES, names, one_of("sha256", wanted[at : at + MANY]))
            if not rows.num_rows:
                continue
            good = ~wrong_summaries(self.settings, rows, parts, own=False)
            tokens = decoded(self.settings, tokens_in(self.settings, rows, parts)[good, :k])
            whole = [key for key, fine in zip(rows["sha256"].to_pylist(), good, strict=True) if fine]
            found.update(zip(whole, tokens, strict=True))
        return found

    def search(
        self,
        vector: Tensor,
        top: int = 10,
        where: str | None = None,
        exact: bool | None = None,
        columns: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """The images nearest to a unit vector [D], best first: their `id`, `score` (the cosine), and `columns`.

        Args:
            where: an SQL condition on the columns of files, e.g. "width > 1000 AND id LIKE 'beach/%'".
            exact: compare with every image; default: where there is no index.
            columns: of ABOUT, and those that users added.

        Raises:
            ValueError: the condition does not parse, or a column is not there.
        """
        return nearest(self, vector, top, where, exact, columns)
