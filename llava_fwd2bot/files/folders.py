"""The images that a command line names: folders, files, patterns and lists; and what is left out of them, by reason."""

from __future__ import annotations

import errno
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .images import extensions
from .text import read_lines

HEIF = (".heic", ".heif")
TOLD = 5  # reasons that a sentence names
_WILD = "*?["


def find_images(
    given: Sequence[str], empty: bool = False, left_out: Counter[str] | None = None
) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """The images in folders (recursively, in sorted order), files, patterns, and lists (.txt, a path in each line).

    Folders that are symbolic links are followed, each once.

    Args:
        empty: whether it is right that there is none yet.
        left_out: counts, by reason, what is in the folders and is not among the images.

    Returns:
        ({id: path}, folders that could not be read). An id is the path below the folder that was given, a file's its
        name; where two would be the same, the path as given.

    Raises:
        ValueError: there is no image file, or a list is no text.
    """
    known = extensions()
    found: dict[str, tuple[str, Path]] = {}  # path as given → (short id, path)
    unreadable: list[dict[str, str]] = []
    left_out = Counter() if left_out is None else left_out

    def refused(error: OSError) -> None:
        unreadable.append({"id": str(error.filename), "reason": f"{error.filename}: {error.strerror}"})

    for start in map(Path, _spelled_out(given, refused, left_out)):
        if not start.is_dir():  # also one that is not there, which is reported with the other bad images
            found[start.as_posix()] = (start.name, start)
            continue
        paths = []
        for folder, names in tree(start, refused, left_out):
            for name in names:
                ending = os.path.splitext(name)[1].lower()
                if ending in known:
                    paths.append(folder / name)
                else:
                    left_out[reason_of(folder / name, ending)] += 1
        for path in sorted(paths):
            found[path.as_posix()] = (path.relative_to(start).as_posix(), path)
    if not found and not empty:
        also = f" Left out: {format_counts(left_out)}." if left_out else ""
        raise ValueError(
            f"There is no image file in {', '.join(given)}. Files are found by extension (.jpg, .png, …).{also}"
        )
    times = Counter(short for short, _ in found.values())
    images = {short if times[short] == 1 else full: path for full, (short, path) in found.items()}
    if len(images) < len(found):  # a path as given is the short id of another image
        images = {full: path for full, (_, path) in found.items()}
    return images, unreadable


def format_counts(left_out: Counter[str]) -> str:
    """The counts in words, the largest first."""
    parts = [f"{count:,} {reason}" for reason, count in left_out.most_common(TOLD)]
    rest = sum(left_out.values()) - sum(count for _, count in left_out.most_common(TOLD))
    return ", ".join([*parts, *([f"{rest:,} others"] if rest else [])])


def reason_of(path: Path | None, ending: str) -> str:
    """Why a file is not among the images; `path`: None where it is in an archive."""
    if path is not None and path.is_symlink() and not path.exists():
        return "links that lead nowhere"
    if ending in HEIF:
        return f"{ending} (pip install pillow-heif)"
    return ending or "without an extension"


def tree(start: Path, refused: Callable[[OSError], None], left_out: Counter[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `start` on with the names of its files, both in sorted order.

    Links are followed after all that is really below, so that an image goes by its own name; a folder that was read
    already is not read again, so that links in a circle end.
    """
    folders, links, seen = [(start, False)], [], set()
    while folders or links:
        folder, linked = folders.pop() if folders else (links.pop(0), True)
        try:
            about = os.stat(folder)
            own = (about.st_dev, about.st_ino)
            if linked and own in seen and about.st_ino:  # 0: the file system has no such numbers
                left_out["linked folders that are read already"] += 1
                continue
            seen.add(own)
            with os.scandir(folder) as entries:
                files, below = [], []
                for entry in entries:
                    if not _is_folder(entry):
                        files.append(entry.name)
                    elif entry.is_symlink():
                        links.append(folder / entry.name)
                    else:
                        below.append((folder / entry.name, linked))
        except OSError as error:
            if error.filename is None:
                error.filename = str(folder)
            refused(error)
            continue
        folders += sorted(below, reverse=True)
        if not folders:
            links.sort()
        yield folder, sorted(files)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself; it is reported as a file that cannot be read
        if error.errno != errno.ELOOP:
            raise
        return False


def _spelled_out(given: Sequence[str], refused: Callable[[OSError], None], left_out: Counter[str]) -> Iterator[str]:
    """Patterns and lists as the paths they stand for; names in a list are relative to it."""
    for name in given:
        path = Path(name)
        if path.suffix.lower() == ".txt" and path.is_file():
            yield from (str(path.parent / line.strip()) for line in read_lines(path) if line.strip())
        elif not os.path.lexists(path) and any(sign in name for sign in _WILD):
            yield from matching(name, refused, left_out)
        else:
            yield name


def matching(pattern: str, refused: Callable[[OSError], None], left_out: Counter[str]) -> list[str]:
    """Paths that a pattern picks, in sorted order; "**" follows links as `tree` does, where glob runs in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in _WILD))
    base, found = Path(*parts[:fixed]), []
    for folder, names in tree(base, refused, left_out) if base.is_dir() else ():
        own = folder.relative_to(base).parts
        picked = (name for name in names if _fits((*own, name), parts[fixed:]))
        found += [*([folder] if own and _fits(own, parts[fixed:]) else []), *(folder / name for name in picked)]
    return sorted(map(str, found))


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """As glob has it: "**" is any number of folders, and no wildcard stands for the dot of a hidden name."""
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    hidden = path[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or (not hidden and _fits(path[1:], pattern))
    return not hidden and fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])
