"""The image files that a data set names, checked before anything is loaded: a missing one is reported at the start."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .images import ImageError

ON_BAD_IMAGE = ("raise", "skip")
_AT_ONCE = 16  # a shared file system answers many questions at once, each slowly


def unusable(names: Iterable[str], folder: str | os.PathLike | None) -> dict[str, str]:
    """The files among `names` that are not there, are no files, or are empty → why. None is opened.

    Args:
        folder: where relative names are looked for.
    """
    unique = list(dict.fromkeys(names))
    parts = [unique[i : i + 1024] for i in range(0, len(unique), 1024)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda part: [_fault(os.path.join(folder or "", name)) for name in part], parts)
        reasons = [reason for part in found for reason in part]
    return {name: reason for name, reason in zip(unique, reasons, strict=True) if reason}


def _fault(path: str) -> str | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # no right to look, a name too long or with a zero byte
        return getattr(error, "strerror", None) or str(error)
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    return None if found.st_size else "the file is empty"


def refuse_unusable(
    bad: dict[str, str], owners: dict[str, str], total: int, folder: str | os.PathLike | None, remedy: str
) -> None:
    """Raises ImageError where `bad` has entries: their number, and the first ten with the records that name them.

    Args:
        owners: the first record of each bad image.
        total: how many images were looked for.
        remedy: what can be done besides bringing the files.
    """
    if not bad:
        return
    lines = [f"{owners[name]}: {Path(folder or '', name)}: {reason}" for name, reason in bad.items()]
    raise ImageError(
        f"{len(bad):,} of {total:,} images cannot be used (--image_folder is {str(folder or '')!r}):\n  "
        + first(lines, "\n  ")
        + f"\nBring the files, correct the names or --image_folder, or {remedy}."
    )


def first(entries: Sequence[str], between: str = ", ", most: int = 10) -> str:
    """The first `most` entries, and how many more there are."""
    more = [f"and {len(entries) - most:,} more"] if len(entries) > most else []
    return between.join([*entries[:most], *more])
