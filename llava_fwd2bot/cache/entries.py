"""An image as its source has it: what it goes by, its size and time, and how its bytes are read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from ..files.regular import irregular


@dataclass(slots=True)
class Entry:
    """An image as its source has it now; `problem`: why it cannot be read at all."""

    root: str
    id: str
    bytes: int = 0
    modified: int = 0  # ns
    problem: str | None = None
    read: Callable[[], bytes] | None = None  # where it is no file of its own
    label: str | None = None  # by which it is told, instead of its source

    @property
    def source(self) -> str:
        return f"{self.root.rstrip('/')}/{self.id}"

    @property
    def name(self) -> str:
        return self.label or self.source

    def row(self, **more: object) -> dict[str, object]:
        """What `files` keeps of it."""
        own = {"root": self.root, "id": self.id, "source": self.source}
        return {**own, "bytes": self.bytes, "modified": self.modified, **more}


def entry_of(root: str, name: str, path: str, told: os.stat_result | None = None) -> Entry:
    """The entry of a file; what it is decides whether it may be opened: a named pipe would be waited for for ever."""
    if not _is_text(path):
        spelled = [os.fsencode(part).decode("utf-8", "backslashreplace") for part in (root, name, path)]
        return Entry(*spelled[:2], problem=f"{spelled[2]}: its name is not UTF-8; rename it")
    try:
        told = os.stat(path) if told is None else told
    except OSError as error:
        return Entry(root, name, problem=f"{path}: {error.strerror}")
    entry = Entry(root, name, told.st_size, told.st_mtime_ns)
    if not stat.S_ISREG(told.st_mode) and (kind := irregular(told.st_mode)):
        entry.problem = f"{path}: is {kind}, not a regular file"
    return entry


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # the cache keeps text
        return False
    return True
