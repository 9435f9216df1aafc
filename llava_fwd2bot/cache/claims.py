"""Claims on chunks of a source, so that several processes of one machine fill a cache without doing the same work.

Chunks depend on the entries' paths alone: processes whose lists differ a little have nearly the same chunks. A chunk
is claimed by a file lock, which the system releases when the process ends, however it ends.
"""

from __future__ import annotations

import threading
import zlib
from pathlib import Path
from typing import Any

from .entries import Entry
from .reader import SummaryCache

LOCKS = 1024  # files that the claims of all chunks share


class Claims:
    """The claims of one process; on object storage every chunk is free, see --shard."""

    def __init__(self, cache: SummaryCache, chunk: int) -> None:
        self.chunk, self._mutex = max(1, chunk), threading.Lock()
        self._held: dict[int, tuple[Any, int]] = {}
        self.folder = Path(cache.path) / ".claims" if cache.local else None
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)

    def starts(self, entry: Entry) -> bool:
        """Whether a chunk begins with this entry."""
        return zlib.crc32(entry.source.encode("utf-8", "replace")) % self.chunk == 0

    def take(self, first: str) -> int | None:
        """The claim on the chunk that begins with the path `first`, or None while another process has it."""
        number = zlib.crc32(first.encode("utf-8", "replace")) // self.chunk % LOCKS
        if self.folder is None:
            return number
        from filelock import FileLock, Timeout

        with self._mutex:
            if number in self._held:
                own, times = self._held[number]
                self._held[number] = (own, times + 1)
                return number
            own = FileLock(self.folder / str(number), thread_local=False)
            try:
                own.acquire(timeout=0)
            except Timeout:
                return None
            self._held[number] = (own, 1)
            return number

    def give(self, number: int) -> None:
        if self.folder is None:
            return
        with self._mutex:
            own, times = self._held.pop(number)
            if times > 1:
                self._held[number] = (own, times - 1)
            else:
                own.release()

    def close(self) -> None:
        with self._mutex:
            for own, _ in self._held.values():
                own.release()
            self._held.clear()
