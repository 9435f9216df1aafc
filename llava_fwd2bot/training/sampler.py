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


class ImageGroupSampler(Sampler[int]):
    """Indices in an order whose batches hold the rows of one image together, so that it is compressed once.

    Groups come in random order and fill batches of `batch_size` rows. A group is cut only if no other of the next
    groups fits the room that is left, or if it is larger than a batch. What fills no whole batch comes last. Every
    index comes exactly once per epoch.

    Args:
        groups: of each row a number that rows of the same images share.
        batch_size: rows per process and step.
        world_size: number of processes (times accumulation steps).
        seed: with the epoch decides the order, so a resumed run sees the same one.
        modality_lengths: as of `ModalityLengthSampler`: batches are then of one modality, and steps of batches that are
            about equally long.
    """

    WINDOW = 64  # groups that are looked through for one that fits

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        modality_lengths: Sequence[int] | None = None,
    ):
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size and world_size should be at least 1, not {batch_size} and {world_size}")
        self.groups = list(groups)
        self.batch_size, self.world_size, self.seed = batch_size, world_size, seed
        self.modality_lengths = None if modality_lengths is None else list(modality_lengths)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose this epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed}-{self.epoch}")
        lengths = self.modality_lengths
        if lengths is None:
            batches, rest = self._batches(range(len(self.groups)), chance)
            chance.shuffle(batches)
        else:
            batches, rest = [], []
            steps: list[list[list[int]]] = []
            for has_image in (True, False):
                own, left = self._batches([i for i, n in enumerate(lengths) if (n > 0) == has_image], chance)
                rest += left
                for start in range(0, len(own), self.world_size * 50):
                    mega = own[start : start + self.world_size * 50]
                    mega.sort(key=lambda batch: max(abs(lengths[i]) for i in batch), reverse=True)
                    steps += [mega[j : j + self.world_size] for j in range(0, len(mega), self.world_size)]
            chance.shuffle(steps)
            steps.sort(key=lambda step: len(step) < self.world_size)  # those of too few batches come last
            batches = [batch for step in steps for batch in step]
        for batch in [*batches, rest]:
            yield from batch

    def _batches(self, rows: Sequence[int], chance: random.Random) -> tuple[list[list[int]], list[int]]:
        """Whole batches of `rows`, and the rows that fill none."""
        members: dict[int, list[int]] = {}
        for i in rows:
            members.setdefault(self.groups[i], []).append(i)
        waiting = list(members.values())
        chance.shuffle(waiting)
        for group in waiting:
            chance.shuffle(group)
        if self.modality_lengths is not None:  # similar ones meet, within as many as 50 steps take
            span = 50 * self.batch_size * self.world_size
            longest = [(max(abs(self.modality_lengths[i]) for i in group), group) for group in waiting]
            parts = [longest[at : at + span] for at in range(0, len(longest), span)]
            waiting = [group for part in parts for _, group in sorted(part, key=lambda entry: -entry[0])]
        waiting.reverse()  # taken from the end
        batches: list[list[int]] = []
        batch: list[int] = []
        while waiting:
            room = self.batch_size - len(batch)
            near = range(len(waiting) - 1, max(-1, len(waiting) - 1 - self.WINDOW), -1)
            at = next((j for j in near if len(waiting[j]) <= room), len(waiting) - 1)
            group = waiting.pop(at)
            batch += group[:room]
            if group[room:]:
                waiting.append(group[room:])
            if len(batch) == self.batch_size:
                batches.append(batch)
                batch = []
        return batches, batch
