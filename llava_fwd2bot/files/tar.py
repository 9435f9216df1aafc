"""Tar files: their members in order, and a member's bytes by their place in the file."""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .regular import open_regular

_BLOCK = 512  # bytes; tar's unit
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar file.

    Attributes:
        size: in bytes. modified: in ns. start: the place of its first byte in the tar file; in a compressed one it is
            of no use.
        read: gives its bytes. Of a compressed tar file it must be called before the next member is taken.
    """

    name: str
    size: int
    modified: int
    start: int
    read: Callable[[], bytes]


def compression(path: str | Path) -> str | None:
    """By what the file is compressed, told by its first bytes; None where it is not."""
    with open_regular(path) as file:
        head = file.read(8)
    return next((name for mark, name in _PACKED.items() if head.startswith(mark)), None)


def members(path: str | Path) -> Iterator[Member]:
    """The regular files in a tar file, compressed or not, in their order; memory does not grow with their number.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no tar file, it is damaged, or its end is missing; the members before the damage were given.
    """
    packed = compression(path) is not None
    try:
        with tarfile.open(path, "r|*" if packed else "r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps every member that it has seen
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isreg():
                    continue
                if member.issparse() and not packed:
                    raise ValueError(f"{path}: {member.name} is stored with holes; pack it again without --sparse")
                place = (member.offset_data, member.size)
                read = partial(_unpacked, path, archive, member) if packed else partial(read_part, path, *place)
                name = member.name.removeprefix("./")
                yield Member(name, member.size, int(member.mtime * 1e9), member.offset_data, read)
            if not packed:
                _check_end(path, archive.offset)
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, error) from error


def read_part(path: str | Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on; OSError where it ends before."""
    with open_regular(path) as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(errno.EIO, f"it ends within the {size:,} bytes at {start:,}", str(path))
    return data


def _unpacked(path: str | Path, archive: tarfile.TarFile, member: Any) -> bytes:
    try:
        return archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: no tar file, or it is cut off or damaged ({error}); copy or download it again")


def _check_end(path: str | Path, at: int) -> None:
    # tarfile takes a header that is cut off or damaged for the end, and would leave out what follows
    with open_regular(path) as file:
        file.seek(at)
        block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise ValueError(f"{path}: cut off at byte {at:,}, where tar's end mark should be; copy or download it again")
    if block != bytes(_BLOCK):
        raise ValueError(f"{path}: damaged at byte {at:,}, where a member should begin; copy or download it again")
