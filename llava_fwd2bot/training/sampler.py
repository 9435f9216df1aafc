"""The order of rows: batches of one modality and of similar lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset, Sampler


class ModalityLengthSampler(Sampler[int]):
    """Indices in an order whose steps (batch_size x world_size rows) hold one modality and similar lengths.

    Rows are sorted by length within mega-batches of 50 steps only, and the steps are shuffled. What fills no whole
    step comes last. Every index comes exactly once per epoch.

    Args:
        modality_lengths: `LlavaDataset.modality_lengths`: negative for rows without a picture.
        batch_size: rows per process and step.
        world_size: number of processes (times accumulation steps, if those should be of one modality too).
        seed: with the epoch decides the order, so a resumed run sees the same one.
    """

    def __init__(self, modality_lengths: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0):
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size and world_size should be at least 1, not {batch_size} and {world_size}")
        self.modality_lengths = list(modality_lengths)
        self.step = batch_size * world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose this epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.modality_lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed}-{self.epoch}")
        steps, rest = [], []
        for has_image in (True, False):
            indices = [i for i, length in enumerate(self.modality_lengths) if (length > 0) == has_image]
            chance.shuffle(indices)
            whole = len(indices) - len(indices) % self.step
            rest += indices[whole:]
            for start in range(0, whole, self.step * 50):
                mega = indices[start : min(start + self.step * 50, whole)]
                mega.sort(key=lambda i: abs(self.modality_lengths[i]), reverse=True)
                steps += [mega[j : j + self.step] for j in range(0, len(mega), self.step)]
        chance.shuffle(steps)
        for step in [*steps, rest]:
            yield from step


class RowLengths(Dataset):
    """The lengths of a data set's rows in its place, for samplers that would open every image to measure them."""

    def __init__(self, lengths: list[int], name: str) -> None:
        self.lengths, self.name = lengths, name

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, range]:
        return {self.name: range(self.lengths[index])}
