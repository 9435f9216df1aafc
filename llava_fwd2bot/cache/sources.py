"""Where images come from, one after the other: folders, lists, patterns, archives, tables, buckets.

A source yields an `Entry` for each image: its key (the folder that was given and the path below it), its size and time,
and how its bytes are read. Nothing is read ahead and nothing is kept, so that memory does not grow with the source.

    sources.py → plan.py (what is new) → decode.py (bytes, hash, pixels) → compressor.py → sink.py (commits)

An `id` may name a part of a file after "#", as "clip.mp4#t=12.5": frames of videos can be entries like any other.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files.folders import matching, reason_of, tree
from ..files.images import extensions
from ..files.tar import is_tar_name
from ..files.text import read_lines
from .entries import Entry, entry_of
from .format import is_local
from .other_sources import of_dataset, of_parquet, of_tar, of_url


@dataclass
class Source:
    """What a command line names, as entries; iterating again looks again.

    Args:
        given: folders (recursively), files, patterns, lists (.txt, or "-" for stdin; a path in each line), tar files
            (also compressed), Parquet files with an image column, Hugging Face data sets ("hf://name" or
            "hf://name:split"), and URLs that fsspec reads. Patterns and lists may name any of the local ones.
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

    def _refuse(self, error: OSError) -> None:
        self.refused.append({"id": str(error.filename), "reason": f"{error.filename}: {error.strerror}"})

    def _all(self) -> Iterator[Entry]:
        for name in self.given:
            if name == "-":
                yield from self._lines(sys.stdin, Path())
            elif name.startswith("hf://"):
                yield from of_dataset(name)
            elif not is_local(name):
                yield from of_url(name, self.left_out)
            else:
                yield from self._local(name)

    def _local(self, name: str) -> Iterator[Entry]:
        path = Path(name)
        if path.suffix.lower() == ".txt" and path.is_file():
            yield from self._lines(read_lines(path), path.parent)
        elif not os.path.lexists(path) and any(sign in name for sign in "*?["):
            for found in matching(name, self._refuse, self.left_out):
                yield from self._place(found)
        else:
            yield from self._place(name)

    def _lines(self, lines: Iterable[str], folder: Path) -> Iterator[Entry]:
        """What a list names, a path in each line; relative to its own folder."""
        for line in lines:
            if name := line.strip():
                yield from self._place(str(folder / name))

    def _place(self, name: str) -> Iterator[Entry]:
        """The images of a folder, a tar file or a Parquet file; else the one file, also one that does not exist, which
        is reported with the other bad images."""
        if os.path.isdir(name):
            yield from walk(absolute(name), self.left_out, self._refuse)
        elif is_tar_name(name) and os.path.isfile(name):
            yield from of_tar(absolute(name), self.left_out)
        elif name.lower().endswith(".parquet") and os.path.isfile(name):
            yield from of_parquet(absolute(name))
        else:
            yield file_entry(name)


def absolute(name: str) -> str:
    """One name for one place: "a/../b" is b, also where a is a link."""
    return os.path.realpath(name) if ".." in Path(name).parts else os.path.abspath(name)


def file_entry(name: str) -> Entry:
    folder, own = os.path.split(absolute(name))
    return entry_of(folder, own, os.path.join(folder, own))


def walk(root: str, left_out: Counter[str], refuse: Callable[[OSError], None]) -> Iterator[Entry]:
    """The images below a folder, folder by folder; folders that are links are followed, each once."""
    known = extensions()
    for folder, names in tree(Path(root), refuse, left_out):
        place = str(folder)
        below = place[len(root.rstrip("/")) + 1 :]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in known:
                yield entry_of(root, f"{below}/{name}" if below else name, f"{place}/{name}")
            else:
                left_out[reason_of(folder / name, ending)] += 1


def paths(found: Iterable[str | os.PathLike]) -> list[Entry]:
    """Entries of files, each by its name."""
    return [file_entry(os.fspath(path)) for path in found]
