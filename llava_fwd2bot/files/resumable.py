"""Files of JSON lines that a stopped program continues."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import parse_records


def resumable_lines(
    file: Path, begins: str = "{", check: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """The records of a file of JSON lines that is to be continued; an incomplete last line is removed from it.

    Args:
        begins: the first characters of every line that this package writes. check: raises ValueError for a record of
            another run.

    Raises:
        ValueError: the file was not written by this package; it is not changed.
    """
    there = file.read_bytes() if file.is_file() else b""
    content = there.rstrip(b"\0")  # after a power cut a file may end in NUL bytes
    end = content.rfind(b"\n") + 1
    tail, start = content[end:], begins.encode()
    records = parse_records(content[:end], file, lines=True) if end else []
    whole = True
    if tail:
        try:
            records += parse_records(tail, file, lines=True)
        except ValueError:
            whole = False
    if not whole and tail[: len(start)] != start[: len(tail)]:
        raise ValueError(f"{file} holds something else and was not changed: choose another file.")
    for record in records if check is not None else ():
        check(record)
    if tail or len(content) < len(there):
        with file.open("r+b") as kept:
            kept.truncate(len(content) if whole else end)
            kept.seek(0, os.SEEK_END)
            kept.write(b"\n" if tail and whole else b"")
            os.fsync(kept.fileno())
    return records
