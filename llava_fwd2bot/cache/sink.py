"""The last stage: stores summaries in a cache, in commits by time and size, or in one safetensors file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .entries import Entry
from .format import FILES, is_local, one_of
from .naming import escaped
from .plan import Filled, is_gone
from .reader import SummaryCache
from .rows import summary_rows
from .tables import EXIF, OK, users_columns
from .tidy import Tidy

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 10.0  # after which what is finished is stored
BYTES = 64 * 2**20  # of encoded summaries, after which they are stored
ROWS = 20_000


class CacheSink:
    """Collects finished images and commits them together: what is not stored is at most SECONDS old.

    Args:
        bar: counts what is stored.
    """

    def __init__(self, cache: SummaryCache, result: Filled, bar: tqdm) -> None:
        self.cache, self.result, self.bar = cache, result, bar
        self.commits, self.tidy = 0, Tidy(cache)
        self._clear()

    def _clear(self) -> None:
        self._since: float | None = None
        self._bytes = 0
        self._made: dict[str, tuple[tuple[int, int], np.ndarray, np.ndarray]] = {}
        self._linked: list[tuple[Entry, str, dict[str, Any], bool]] = []  # entry, content, about, compressed now
        self._skipped: list[tuple[Entry, str, bool]] = []
        self._after: list[Callable[[], None]] = []

    # ------------------------------------------------------------------ what comes in
    def encode(self, summary: Tensor, vectors: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from .compressor import encoded

        return encoded(self.cache.codec, summary, vectors)

    @property
    def overflow(self) -> str:
        from .compressor import OVERFLOW

        return OVERFLOW.format(codec=self.cache.codec.name)

    @property
    def keys(self) -> set[str]:
        """The contents that the next commit stores."""
        return set(self._made)

    def size_of(self, key: str) -> tuple[int, int]:
        """Width and height of an image that came in, or that is stored."""
        return self._made[key][0] if key in self._made else self.cache.has([key])[key]

    def made(
        self,
        entry: Entry,
        key: str,
        size: tuple[int, int],
        exif: dict[str, Any],
        tokens: np.ndarray,
        vector: np.ndarray,
    ) -> None:
        """An image that was compressed: tokens uint8 [k, B], vector float16 [D]."""
        self._begin()
        self._made[key] = (size, tokens, vector)
        self._bytes += tokens.nbytes + vector.nbytes
        self._linked.append((entry, key, {"width": size[0], "height": size[1], **exif}, True))

    def link(self, entry: Entry, key: str, size: tuple[int, int], exif: dict[str, Any]) -> None:
        """An image whose content is there."""
        self._begin()
        self._linked.append((entry, key, {"width": size[0], "height": size[1], **exif}, False))

    def skip(self, entry: Entry, reason: str, broken: bool) -> None:
        self._begin()
        self._skipped.append((entry, reason, broken))

    def after(self, call: Callable[[], None]) -> None:
        """To be called once all that came in is stored."""
        self._begin()
        self._after.append(call)

    def _begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    @property
    def due(self) -> bool:
        if self._since is None:
            return False
        rows = len(self._linked) + len(self._skipped)
        return self._bytes >= BYTES or rows >= ROWS or time.monotonic() - self._since >= SECONDS

    # ------------------------------------------------------------------ what is stored
    def flush(self) -> None:
        """Stores all that came in; where that fails, it is kept for another try."""
        if self._since is None:
            return
        summaries = None
        if self._made:
            sizes, tokens, vectors = zip(*self._made.values(), strict=True)
            summaries = summary_rows(self.cache.settings, list(self._made), sizes, np.stack(tokens), np.stack(vectors))
        entries, gone = self._files()
        stored = bool(entries) or summaries is not None
        if stored:
            self.cache.commit(summaries, entries, gone)
            self.commits += 1
        for broken in (False, True):
            rows = [entry.row(reason=reason) for entry, reason, own in self._skipped if own is broken]
            self.cache.skip(rows, broken)
            for row in rows:
                self.result.skipped.append(row)
                self.bar.write(f"fwd2bot: skipped {escaped(row['reason'])}", file=sys.stderr)
        self.result.compressed += sum(now for *_, now in self._linked)
        self.result.renamed += sum(not now for *_, now in self._linked)
        self.bar.update(len(self._linked) + len(self._skipped))
        after = self._after
        self._clear()
        for call in after:
            call()
        if stored:
            self.tidy.after_commit()

    def _files(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of `files`, and the sources that were moved to them."""
        own = users_columns(self.cache.table(FILES).schema)
        known = _by_content(self.cache, [key for _, key, _, now in self._linked if not now])
        rows, gone = [], []
        for entry, key, about, now in self._linked:
            others = known.get(key, []) if not now else []
            kept = {name: others[0][name] for name in EXIF} if others else {}
            moved = next((row for row in others if _moved(row, entry, gone)), None)
            if moved is not None and not any(row["source"] == entry.source for row in others):
                gone.append(moved["source"])
                kept |= {name: moved[name] for name in own}
            rows.append({**entry.row(sha256=key, status=OK), **kept, **about})
        return rows, gone


def _by_content(cache: SummaryCache, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    unique = list(dict.fromkeys(keys))
    for at in range(0, len(unique), 1000):
        condition = f"{one_of('sha256', unique[at : at + 1000])} AND status = '{OK}'"
        for row in cache.rows(FILES, None, condition).to_pylist():
            found.setdefault(row["sha256"], []).append(row)
    return found


def _moved(row: dict[str, Any], entry: Entry, gone: Sequence[str]) -> bool:
    """Whether a row's file is gone while its root exists; a missing root may be a drive that is not mounted."""
    if row["source"] in gone or row["source"] == entry.source or not is_local(row["source"]):
        return False
    return os.path.isdir(row["root"]) and is_gone(row)
