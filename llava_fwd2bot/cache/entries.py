"""An image of a source: its root and id, its size and time, and how its bytes are read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from ..files.regular import irregular
from ..files.text import is_utf8, spelled


@dataclass(slots=True)
class Entry:
    """An image as its source has it now; `problem`: why it cannot be read at all."""

    root: str
    id: str
    bytes: int = 0
    modified: int = 0  # ns
    problem: str | None = None
    read: Callable[[], bytes] | None = None  # where it is no file of its own
    label: str | None = None  # what messages call it, where that is not its source

    @property
    def source(self) -> str:
        return f"{self.root.rstrip('/')}/{self.id}"

    @property
    def display_name(self) -> str:
        """What messages call it."""
        return self.label or self.source

    def row(self, **more: object) -> dict[str, object]:
        """What `files` keeps of it."""
        own = {"root": self.root, "id": self.id, "source": self.source}
        return {**own, "bytes": self.bytes, "modified": self.modified, **more}


def entry_of(root: str, id: str, path: str, status: os.stat_result | None = None) -> Entry:
    """The entry of the file `path`; of anything but a regular file (reading a named pipe may never end) with a problem.

    Args:
        root, id: of the entry. status: of the file, where it is known already.
    """
    if not is_utf8(path):
        return misnamed(root, id, path)
    try:
        status = os.stat(path) if status is None else status
    except OSError as error:
        hint = "; check the name and the folder it is looked for in" if error.errno == errno.ENOENT else ""
        return Entry(root, id, problem=f"{path}: {error.strerror}{hint}")
    entry = Entry(root, id, status.st_size, status.st_mtime_ns)
    if not stat.S_ISREG(status.st_mode) and (kind := irregular(status.st_mode)):
        entry.problem = f"{path}: is {kind}, not a regular file"
    return entry


def misnamed(root: str, id: str, path: str) -> Entry:
    """The entry of what has a name that is not UTF-8: the cache keeps text."""
    return Entry(spelled(root), spelled(id), problem=f"{spelled(path)}: its name is not UTF-8; rename it")
