"""Images that training leaves out, because their files cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch


class BadImages:
    """Which images were skipped so far, in the processes of one data loader.

    Args:
        names: of all images that may be skipped.

    Attributes:
        flags: one for each name, in their order; in shared memory, as workers set them and the trainer counts them.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._place = {name: at for at, name in enumerate(dict.fromkeys(names))}
        self.flags = torch.zeros(len(self._place), dtype=torch.uint8).share_memory_()

    @property
    def names(self) -> list[str]:
        return list(self._place)

    @property
    def skipped(self) -> list[str]:
        return [name for name, at in self._place.items() if self.flags[at]] if self.flags.any() else []

    def any_of(self, names: Iterable[str]) -> bool:
        return bool(self._place) and any(self.flags[self._place[name]] for name in names)

    def skip(self, name: str, reason: str) -> None:
        """Warns of the image the first time."""
        if not self.flags[self._place[name]]:
            self.flags[self._place[name]] = 1
            warnings.warn(f"skipped a picture: {reason}", stacklevel=3)
