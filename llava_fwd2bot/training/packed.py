"""The rows of a data set in a few arrays.

A list of 665,000 records is millions of Python objects. Each worker changes their reference counts as it reads them,
and ends with a copy of its own; arrays stay shared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np

from .records import Row


class PackedRows:
    """Rows that are decoded when they are asked for; what is counted over all of them is at hand."""

    def __init__(self, rows: Iterable[Row]) -> None:
        content = bytearray()
        ends, words, images, captions, groups = [], [], [], [], []
        numbers: dict[tuple[str, ...] | int, int] = {}
        names: set[str] = set()
        for i, row in enumerate(rows):
            content += json.dumps([row.name, row.images, row.turns, row.captions]).encode()
            ends.append(len(content))
            words.append(sum(len(turn["value"].split()) for turn in row.turns))
            images.append(len(row.images))
            captions.append(len(row.captions))
            groups.append(numbers.setdefault(tuple(row.images) or i, len(numbers)))
            names.update(row.images)
        self._content = np.frombuffer(bytes(content), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)
        self.words = np.array(words, dtype=np.int32)  # of the turns of each row
        self.images = np.array(images, dtype=np.int32)  # of each row
        self.captions = np.array(captions, dtype=np.int32)  # of each row
        self.groups = np.array(groups, dtype=np.int64)  # equal for rows of the same images
        self.distinct_images = len(names)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return Row(*json.loads(self._content[start : self._ends[index]].tobytes()))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedRows) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
