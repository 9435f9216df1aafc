"""Tar files: their names, their members in order, and a member's bytes by their place in the file."""

from __future__ import annotations

import errno
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from .regular import open_regular

# The endings of tar files' names, by which they are found; what compresses one is told by its first bytes.
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
# Each may be missing in a Python; zstd came with 3.14, and backports.zstd is the same module for older ones.
_MODULES = {"gzip": ["gzip"], "bzip2": ["bz2"], "xz": ["lzma"], "zstd": ["compression.zstd", "backports.zstd"]}
_AT_ONCE = 2**20  # bytes
_LARGEST = 2**62  # bytes; a place beyond 2**63 cannot be looked for
_VOLUME_LABEL = b"V"  # GNU tar's name of a whole tar file, which is no member


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar file, or a link, which has no bytes of its own there.

    Attributes:
        size: in bytes. modified: in ns. start: the place of its first byte in the tar file; in a compressed one it is
            of no use.
        read: gives its bytes. Of a compressed tar file it must be called before the next member is taken.
        problem: why it has no bytes, as a link has none, and what to do; None for a file.
    """

    name: str
    size: int
    modified: int
    start: int
    read: Callable[[], bytes]
    problem: str | None = None


def is_tar_name(name: str) -> bool:
    """Whether a file of this name is a tar file by its ending."""
    return name.lower().endswith(ENDINGS)


def compression(path: str | Path) -> str | None:
    """By what the file is compressed, told by its first bytes; None where it is not."""
    with open_regular(path) as file:
        return _compression(file)


def _compression(file: BinaryIO) -> str | None:
    head = file.read(8)
    file.seek(0)
    return next((name for mark, name in _PACKED.items() if head.startswith(mark)), None)


def members(path: str | Path) -> Iterator[Member]:
    """The files and links in a tar file, compressed or not, in their order; memory does not grow with their number.

    It is read to its end, so that all headers, the end mark, and the checksums of a compressed file are checked. A tar
    file that is not compressed has no checksum of its members' bytes.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is no tar file, it is damaged, its end is missing, or data follow its end. What came before the
            damage was given: where a compressed file's checksum is wrong, all members were, and one has wrong bytes.
    """
    with open_regular(path) as file:
        packed = _compression(file)
        with _damage_told(path, packed):
            plain = file if packed is None else _module(path, packed).open(file)
            mode: Any = "r:" if packed is None else "r|"
            with tarfile.open(fileobj=plain, mode=mode, tarinfo=_Strict, encoding="utf-8") as archive:
                while (member := archive.next()) is not None:
                    # tarfile keeps every member that it has seen
                    archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                    if not member.isdir() and member.type != _VOLUME_LABEL:
                        yield _member(path, archive, member, packed)
                _check_rest(path, archive.fileobj, packed)


def _member(path: str | Path, archive: tarfile.TarFile, member: tarfile.TarInfo, packed: str | None) -> Member:
    name, modified = member.name.removeprefix("./"), int(member.mtime * 1e9)
    if (problem := _problem(member)) is not None:
        return Member(name, 0, modified, member.offset_data, partial(_refuse, f"{path}/{name}: {problem}"), problem)
    if member.issparse() and packed is None:
        raise ValueError(f"{path}: {member.name} is stored with holes; pack it again without --sparse")
    read = partial(read_part, path, member.offset_data, member.size)
    if packed is not None:
        read = partial(_unpacked, path, packed, archive, member)
    return Member(name, member.size, modified, member.offset_data, read)


def _problem(member: tarfile.TarInfo) -> str | None:
    if member.islnk():
        return "is a hard link in the tar; pack it with --hard-dereference"
    if member.issym():
        return "is a symbolic link in the tar; pack it with --dereference"
    return None if member.isreg() else f"is no file in the tar, but of type {member.type!r}; pack the file itself"


def _refuse(message: str) -> bytes:
    raise ValueError(message)


def read_part(path: str | Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on; OSError where it ends before."""
    with open_regular(path) as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(errno.EIO, f"it ends within the {size:,} bytes at {start:,}", str(path))
    return data


def _unpacked(path: str | Path, packed: str, archive: tarfile.TarFile, member: Any) -> bytes:
    with _damage_told(path, packed):
        return archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]


class _Strict(tarfile.TarInfo):
    """tarfile takes a header that is cut off or damaged for the end, and would leave out what follows."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        at = archive.fileobj.tell()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise  # the end mark
        except (tarfile.HeaderError, ValueError) as error:
            raise tarfile.ReadError(f"{error} at byte {at:,}") from error
        if not 0 <= member.size < _LARGEST:  # below 0 the next header would be looked for before this one
            raise tarfile.ReadError(f"a size of {member.size:,} bytes at byte {at:,}")
        return member


def _check_rest(path: str | Path, file: Any, packed: str | None) -> None:
    """After the end mark's first block tarfile reads no more; zeros may follow, and a compressed file's checksum."""
    at = file.tell()
    while part := file.read(_AT_ONCE):
        if rest := part.lstrip(b"\0"):
            at += len(part) - len(rest)
            where = f"at byte {at:,}{f' of what {packed} compressed' if packed else ''}"
            raise ValueError(
                f"{path}: data after the tar's end mark {where}: it is concatenated or damaged; pack it again"
            )
        at += len(part)


def _module(path: str | Path, packed: str) -> Any:
    missing: ImportError | None = None
    for name in _MODULES[packed]:
        try:
            return import_module(name)
        except ImportError as error:
            missing = error
    remedy = "pip install backports.zstd, or unpack it" if packed == "zstd" else "unpack it"
    raise ValueError(f"{path}: compressed by {packed}, which this Python does not read; {remedy}") from missing


@contextmanager
def _damage_told(path: str | Path, packed: str | None) -> Iterator[None]:
    kinds: list[type[Exception]] = [tarfile.TarError, EOFError, zlib.error]
    if packed in ("xz", "zstd"):
        module = _module(path, packed)
        kinds.append(module.LZMAError if packed == "xz" else module.ZstdError)
    try:
        yield
    except tuple(kinds) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:  # of the disk; those of gzip and bz2 have none
            raise
        raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: no tar file, or it is cut off or damaged ({error}); copy or download it again")
