"""Files written whole or not at all: beside their place, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .text import json_text, spelled


def write_json(path: str | os.PathLike, values: dict[str, Any] | list[Any]) -> None:
    write_text(path, json_text(values, indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8; the bytes of a file name that are none are spelled out."""
    write_bytes(path, spelled(text).encode("utf-8"))


def temporary_path(path: str | os.PathLike) -> Path:
    """Where `path` is written until it is whole: a hidden name in the same folder, of this process."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def as_other_files(path: str | os.PathLike) -> None:
    """Gives `path` the permissions of any new file: safetensors writes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes to a temporary path, then renames: a full disk leaves what was there before.

    Raises:
        OSError: it cannot be written; it names `path`, and not the temporary one.
    """
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(error: OSError, path: str | os.PathLike) -> OSError:
    return OSError(error.errno, f"It cannot be written ({error.strerror}): choose another place", os.fspath(path))


@contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside `path`, which takes its place when all is written; after an error nothing is left of it.

    Raises:
        NotADirectoryError: `path` is a file. OSError: it cannot be replaced; it is as it was, and the message says
            where the new one lies.
    """
    path = Path(path).resolve()  # a link to a folder keeps leading to what it leads to
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(20, "There is a file where a folder is to be written", str(path))
    # process numbers are not unique on shared disks
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    before = staging.with_suffix(".old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise _unwritable(error, path) from error
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        if path.exists():
            os.rename(path, before)
        os.rename(staging, path)
    except OSError as error:
        if before.exists():
            os.rename(before, path)
        raise OSError(error.errno, f"{error.strerror}; what was written for it lies in {staging}", str(path)) from error
    shutil.rmtree(before, ignore_errors=True)
