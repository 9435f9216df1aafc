"""Statistics of all evaluators and studies: 95 % intervals and chances, by drawing items anew.

All items of an image are drawn together, as questions about one image are not independent. Comparisons are paired: both
sides are drawn on the same items. Figures that are no mean of items, POPE's F1 and MME's points, have intervals from
`Counts`, which add up over images.

Shapes: G groups (images), C counts, B draws, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDS = 2000  # draws of a bootstrap


def bounds(draws: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a figure's draws, [B]."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def numbers(groups: Sequence[Any]) -> np.ndarray:
    """The number of each item's group."""
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def drawn(columns: np.ndarray, rounds: int = ROUNDS, seed: int = 0, strata: np.ndarray | None = None) -> np.ndarray:
    """[G, C] → the sums of `columns` over groups drawn anew, within each stratum if there are several, [B, C]."""
    generator, sums = np.random.default_rng(seed), np.empty((rounds, columns.shape[1]))
    strata = np.zeros(len(columns)) if strata is None else strata
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    for draw in range(rounds):  # one at a time: a benchmark may have 200,000 items
        picked = np.concatenate([generator.choice(group, len(group)) for group in groups])
        sums[draw] = columns[picked].sum(0)
    return sums


def bootstrap(
    values: Sequence[float],
    against: Sequence[float] | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, or of its ratio to the mean of `against` on the same items.

    Resamples in which `against` sums to 0 are left out.

    Args:
        groups: the group of each item. Groups are drawn whole.

    Raises:
        ValueError: the three are not of the same items, or `against` is 0 for every item.
    """
    over = np.asarray(values, dtype=float)
    under = np.ones_like(over) if against is None else np.asarray(against, dtype=float)
    if over.shape != under.shape:
        raise ValueError(f"a paired comparison needs the same items: {len(over)} and {len(under)}")
    columns = [over, under]
    if groups is not None:
        if len(groups) != len(over):
            raise ValueError(f"{len(over)} items, but groups of {len(groups)}")
        columns = [np.bincount(numbers(groups), weights=column) for column in columns]
    return _ratio(*drawn(np.stack(columns, 1), rounds, seed).T)


def _ratio(over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the ratios [B] of draws; those without a ratio are left out."""
    known = under > 0
    if not known.any():
        raise ValueError("the ratio is undefined: the other side is 0 in every draw")
    return bounds(over[known] / under[known])


def sign_flips(
    ours: Sequence[float],
    theirs: Sequence[float],
    groups: Sequence[Any] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """p of a paired permutation test: how often random signs of the items (or groups) give as large a difference."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if groups is not None:
        difference = np.bincount(numbers(groups), weights=difference)
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    generator, seen = np.random.default_rng(seed), abs(difference.sum()) - 1e-12
    flips = (abs((generator.choice((-1.0, 1.0), (1, len(difference))) * difference).sum()) for _ in range(draws))
    return (1 + sum(total >= seen for total in flips)) / (draws + 1)


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


def interval(own: Counts, against: Counts | None = None, rounds: int = ROUNDS, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a figure, or of its ratio to another on the same draws of images.

    Raises:
        ValueError: the two are not of the same images, or there is no ratio, as the other is 0.
    """
    if against is not None and own.images != against.images:
        raise ValueError(f"a paired comparison needs the same images: {len(own.images)} and {len(against.images)}")
    sides = [own] if against is None else [own, against]
    sums = drawn(np.concatenate([side.rows for side in sides], 1), rounds, seed, own.strata)
    figures = own.figure(sums[:, : own.rows.shape[1]])
    return bounds(figures) if against is None else _ratio(figures, against.figure(sums[:, own.rows.shape[1] :]))
