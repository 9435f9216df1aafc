"""Regular files alone: nothing is opened that may wait for ever."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """The file `path`, open for reading; a named pipe, a socket or a device is not opened, as it may wait for ever.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    _refuse_irregular(path, os.stat(path).st_mode)
    # without waiting: what was a file a moment ago may be a pipe now
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    try:
        _refuse_irregular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a regular file's bytes; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def irregular(mode: int) -> str | None:
    """What a file of this mode is, where it is neither a regular file nor a folder; else None."""
    for name, kind in {
        "a named pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }.items():
        if kind(mode):
            return name
    return None


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a picture", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is {irregular(mode) or 'something else'}, not a regular file", str(path))
