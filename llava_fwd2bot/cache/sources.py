"""Where images come from, one after the other: folders, lists, patterns, archives, tables, buckets.

A source yields an `Entry` for each image: its key (the folder that was given and the path below it), its size and time,
and how its bytes are read. Nothing is read ahead and nothing is kept, so that memory does not grow with the source.

    sources.py → plan.py (what is new) → decode.py (bytes, hash, pixels) → compressor.py → sink.py (commits)

An `id` may name a part of a file after "#", as "clip.mp4#t=12.5": frames of videos can be entries like any other.
"""

from __future__ import annotations

import glob
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .entries import Entry, entry_of, extensions, reason_of
from .format import is_local
from .other_sources import of_dataset, of_parquet, of_tar, of_url

ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass
class Source:
    """What a command line names, as entries; iterating again looks again.

    Args:
        given: folders (recursively), files, patterns, lists (.txt, or "-" for stdin; a path in each line), tar files,
            Parquet files with an image column, Hugging Face data sets ("hf://name" or "hf://name:split"), and URLs
            that fsspec reads.
        shard: (i, n): of n parts of the entries, the i-th, from 1 on.

    Attributes:
        left_out: counts by reason of what is in the folders and is not among the entries.
        refused: folders that could not be read.
    """

    given: Sequence[str]
    shard: tuple[int, int] = (1, 1)
    left_out: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Entry]:
        self.left_out.clear()
        self.refused.clear()
        number, parts = self.shard
        for entry in self._all():
            if parts == 1 or zlib.crc32(entry.source.encode("utf-8", "replace")) % parts == number - 1:
                yield entry

    def _all(self) -> Iterator[Entry]:
        for name in self.given:
            if name == "-":
                yield from of_lines(sys.stdin, Path())
            elif name.startswith("hf://"):
                yield from of_dataset(name)
            elif not is_local(name):
                yield from of_url(name, self.left_out)
            else:
                yield from self._local(name)

    def _local(self, name: str) -> Iterator[Entry]:
        path = Path(name)
        if path.is_dir():
            yield from walk(absolute(name), self.left_out, self.refused)
        elif name.lower().endswith(ARCHIVES) and path.is_file():
            yield from of_tar(absolute(name), self.left_out)
        elif path.suffix.lower() == ".parquet" and path.is_file():
            yield from of_parquet(absolute(name))
        elif path.suffix.lower() == ".txt" and path.is_file():
            with path.open(encoding="utf-8-sig") as lines:
                yield from of_lines(lines, path.parent)
        elif not os.path.lexists(path) and any(sign in name for sign in "*?["):
            for found in sorted(glob.iglob(name, recursive=True)):
                if os.path.isdir(found):
                    yield from walk(absolute(found), self.left_out, self.refused)
                else:
                    yield file_entry(found)
        else:  # also one that is not there, which is told with the other bad images
            yield file_entry(name)


def of_lines(lines: Iterable[str], folder: Path) -> Iterator[Entry]:
    """The files that a list names, a path in each line; relative to its own folder."""
    for line in lines:
        if name := line.strip():
            yield file_entry(str(folder / name))


def absolute(name: str) -> str:
    """One name for one place: "a/../b" is b, also where a is a link."""
    return os.path.realpath(name) if ".." in Path(name).parts else os.path.abspath(name)


def file_entry(name: str) -> Entry:
    folder, own = os.path.split(absolute(name))
    return entry_of(folder, own, os.path.join(folder, own))


def walk(root: str, left_out: Counter[str], refused: list[dict[str, str]]) -> Iterator[Entry]:
    """The images below a folder, in the order of their paths; folders that are links are followed, each once."""
    known, seen = extensions(), set()
    stack: list[tuple[str, list[str]]] = []  # a folder, and what of it is to come, in reverse

    def enter(folder: str) -> None:
        try:
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                left_out["linked folders that are read already"] += 1
                return
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as found:  # names alone: a folder may have millions
                names = sorted(entry.name + "/" if _is_folder(entry) else entry.name for entry in found)
        except OSError as error:
            refused.append({"id": folder, "reason": f"{folder}: {error.strerror}"})
            return
        stack.append((folder, names[::-1]))

    enter(root)
    while stack:
        folder, names = stack[-1]
        if not names:
            stack.pop()
            continue
        name = names.pop()
        path = os.path.join(folder, name.rstrip("/"))
        if name.endswith("/"):
            enter(path)
            continue
        ending = os.path.splitext(name)[1].lower()
        if ending in known:
            yield entry_of(root, path[len(root.rstrip("/")) + 1 :], path)
        else:
            left_out[reason_of(ending)] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; it is told as a file that cannot be read
        return False


def paths(found: Iterable[str | os.PathLike]) -> list[Entry]:
    """Entries of files, each by its name."""
    return [file_entry(os.fspath(path)) for path in found]
