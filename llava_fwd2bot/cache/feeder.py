"""The first half of the pipeline, in a thread of its own: it reads, hashes, looks up and decodes new files.

The number of files and bytes between this thread and the calling one is bounded. They are taken in order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .decode import Content, read_content
from .entries import Entry
from .pool import Pool, Stopped, Task
from .signals import Stop

LOOKUP = 64  # contents that are looked up at once
HELD = 256 * 2**20  # bytes of files that are read and not decoded


@dataclass(slots=True)
class Item:
    """An entry between two stages. `task` gives its Prepared. Without a task its content is stored already (`size` is
    set), or is compressed in this run for another entry."""

    entry: Entry
    key: str = ""
    problem: str | None = None
    broken: bool = False
    task: Task | None = None
    size: tuple[int, int] | None = None
    claim: int | None = None
    bytes: int = 0


class Feeder:
    """The thread that plans and reads; iterate to get the items, in order.

    Args:
        known: of contents, {SHA-256: (width, height)} of those that are there.
        prepare: (bytes, name) → Prepared.
        most: items that were read and not taken yet.
    """

    def __init__(
        self,
        pool: Pool,
        stop: Stop,
        known: Callable[[Sequence[str]], dict[str, tuple[int, int]]],
        prepare: Callable[[bytes, str], Any],
        most: int,
    ) -> None:
        self.pool, self.stop, self.known, self.prepare = pool, stop, known, prepare
        self.most, self.lookup = most, max(1, min(LOOKUP, most // 2))
        self.flying: set[str] = set()  # contents that this run compresses, until they are stored
        self._items: queue.SimpleQueue[Item | BaseException | str | None] = queue.SimpleQueue()
        self._room, self._count, self._bytes = threading.Condition(), 0, 0
        self.needed, self.ready = threading.Event(), threading.Event()  # the model is: to be loaded, and loaded

    def start(self, chunks: Iterable[tuple[int | None, Sequence[Entry]] | None]) -> None:
        threading.Thread(target=self._run, args=(chunks,), daemon=True).start()

    def get(self, timeout: float) -> Item | str | None:
        """The next item; "end" after the last, "wait" where the rest is with other processes, None where none came."""
        try:
            found = self._items.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, Item):
            with self._room:
                self._count -= 1
                self._bytes -= found.bytes
                self._room.notify()
        return found

    def _run(self, chunks: Iterable[tuple[int | None, Sequence[Entry]] | None]) -> None:
        try:
            for chunk in chunks:
                if chunk is None:
                    self._items.put("wait")
                    continue
                claim, entries = chunk
                for at in range(0, len(entries), self.lookup):
                    self._some(entries[at : at + self.lookup], claim)
            self._items.put("end")
        except Stopped:
            self._items.put("end")
        except BaseException as error:  # it is raised where the items are taken
            self._items.put(error)

    def _some(self, entries: Sequence[Entry], claim: int | None) -> None:
        items, reads = [], []
        for entry in entries:
            self._enter(entry.bytes)
            items.append(Item(entry, claim=claim, bytes=entry.bytes))
            reads.append(self.pool.submit(read_content, entry))
        contents: dict[int, Content] = {}
        for i, (item, task) in enumerate(zip(items, reads, strict=True)):
            try:
                contents[i] = self.pool.result(task, self.stop)
                item.key = contents[i].key
            except TimeoutError as error:
                item.problem = f"{item.entry.display_name}: {error}"
            except OSError as error:
                item.problem = f"{item.entry.display_name}: {error.strerror or error}"
            except ValueError as error:
                item.problem, item.broken = str(error), True
        keys = [item.key for item in items if item.key and item.key not in self.flying]
        known = self.known(keys) if keys else {}
        for i, item in enumerate(items):
            if item.problem is None and item.key not in self.flying:
                item.size = known.get(item.key)
                if item.size is None:
                    self._wait_for_model()
                    self.flying.add(item.key)
                    item.task = self.pool.submit(self.prepare, contents[i].data, item.entry.display_name)
            self._items.put(item)

    def _wait_for_model(self) -> None:
        self.needed.set()
        while not self.ready.wait(0.1):
            if self.stop.is_set():
                raise Stopped

    def _enter(self, size: int) -> None:
        with self._room:
            while self._count and (self._count >= self.most or self._bytes + size > HELD):
                if self.stop.is_set():
                    raise Stopped
                self._room.wait(0.1)
            self._count += 1
            self._bytes += size
