"""Intervals of figures that are no mean of items: POPE's F1 and MME's points, from counts that add up over images.

What an image adds is a row of counts; a bootstrap draws images, adds their rows, and makes the figure of the sums.
MME draws within each task, as each of its images belongs to one; POPE's images are asked about in every category.

Shapes: G images, C counts, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("pope", "mme")


@dataclass
class Counts:
    """A figure's counts by image, in one order of images, with the stratum that each is drawn within."""

    kind: str
    rows: np.ndarray  # [G, C]
    strata: np.ndarray  # [G]
    images: list[str]

    def figure(self, sums: np.ndarray) -> np.ndarray:
        """[B, C] sums of counts → the figure of each draw, [B]; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "pope":  # of each category: right yes, said yes, true yes
                both, predicted, truth = sums.reshape(len(sums), -1, 3).transpose(2, 0, 1)
                return np.where(predicted + truth > 0, 2 * both / (predicted + truth), 0.0).mean(1)
            hits, counted, pairs, seen = sums.reshape(len(sums), -1, 4).transpose(2, 0, 1)
            return 100 * (hits / counted + pairs / seen).sum(1)

    @property
    def value(self) -> float:
        return float(self.figure(self.rows.sum(0)[None])[0])


def counts(parts: dict[str, Any]) -> Counts:
    """What a scorer kept for its first figure: {"kind", "items": [[image, category or task, …], …]}.

    An item of POPE ends with whether yes was said and whether it is right; one of MME with whether it was right.

    Raises:
        ValueError, TypeError, KeyError: it is nothing of the sort.
    """
    kind, items = parts["kind"], parts["items"]
    if kind not in KINDS:
        raise ValueError(f"no figure of kind {kind!r} is known; there are {', '.join(KINDS)}")
    columns = sorted({item[1] for item in items})
    width = 3 if kind == "pope" else 4
    rows: dict[str, np.ndarray] = {}
    strata: dict[str, str] = {}
    for image, column, *fields in items:
        row = rows.setdefault(image, np.zeros(width * len(columns)))
        at = width * columns.index(column)
        if kind == "pope":
            predicted, truth = map(bool, fields)
            row[at : at + 3] += (predicted and truth, predicted, truth)
        else:
            row[at : at + 2] += (bool(fields[0]), 1)
            strata[image] = column
    if kind == "mme":  # a pair is right where both of an image's questions are
        for image, row in rows.items():
            at = width * columns.index(strata[image])
            row[at + 2 : at + 4] = (row[at] == row[at + 1], 1)
    images = sorted(rows)
    where = np.array([columns.index(strata[image]) if image in strata else 0 for image in images])
    return Counts(kind, np.stack([rows[image] for image in images]), where, images)


def interval(own: Counts, against: Counts | None = None, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a figure, or of its ratio to another on the same draws of images.

    Raises:
        ValueError: the two are not of the same images, or there is no ratio, as the other is 0.
    """
    if against is not None and own.images != against.images:
        raise ValueError(f"a paired comparison needs the same images: {len(own.images)} and {len(against.images)}")
    generator = np.random.default_rng(seed)
    sides: Sequence[Counts] = [own] if against is None else [own, against]
    sums = [np.empty((rounds, side.rows.shape[1])) for side in sides]
    groups = [np.flatnonzero(own.strata == stratum) for stratum in np.unique(own.strata)]
    for draw in range(rounds):  # one at a time: a benchmark may have many images
        picked = np.concatenate([generator.choice(group, len(group)) for group in groups])
        for side, total in zip(sides, sums, strict=True):
            total[draw] = side.rows[picked].sum(0)
    figures = [side.figure(total) for side, total in zip(sides, sums, strict=True)]
    drawn = figures[0]
    if against is not None:
        known = figures[1] > 0
        drawn = drawn[known] / figures[1][known]
    if not len(drawn):
        raise ValueError("there is no ratio to what is 0 in every draw")
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
