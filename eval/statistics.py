"""Statistics of the studies, beside those of the evaluators: intervals over seeds, and p of many claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_fwd2bot.evaluation.resample import ROUNDS, bounds, numbers


def over_seeds(ours: np.ndarray, theirs: np.ndarray, groups: Sequence[Any], ratio: bool = False) -> tuple[float, float]:
    """The 95 % interval of the difference, or ratio, of two means, over groups of items and the seeds of both sides.

    Resamples in which `theirs` is 0 have no ratio and are left out.

    Args:
        ours, theirs: [S, items] of the same items; the two may have different numbers of seeds.
    """
    group = numbers(groups)
    sums = [np.stack([np.bincount(group, weights=seed) for seed in side]) for side in (ours, theirs)]  # [S, G] each
    counts, generator, drawn = np.bincount(group), np.random.default_rng(0), []
    for _ in range(ROUNDS):
        picked = generator.integers(0, len(counts), len(counts))
        a, b = (_mean_of_seeds(x, generator)[picked].sum() / counts[picked].sum() for x in sums)
        if not ratio or b > 0:
            drawn.append(a / b if ratio else a - b)
    return bounds(drawn)


def _mean_of_seeds(sums: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mean over seeds drawn anew, [S, G] → [G], corrected for their small number; one seed is kept as is."""
    count, mean = len(sums), sums.mean(0)
    if count == 1:
        return mean
    return mean + (count / (count - 1)) ** 0.5 * (sums[generator.integers(0, count, count)].mean(0) - mean)


def chance(difference: float, drawn: np.ndarray) -> float:
    """Two-sided p of a difference, by the standard error of its draws, [B].

    Counting draws of the other sign cannot give a p below 1 / B, too coarse for a correction over hundreds of
    comparisons.
    """
    error = float(drawn.std(ddof=1))
    return math.erfc(abs(difference) / error / math.sqrt(2)) if error > 0 else float(difference == 0)


def holm(chances: Sequence[float]) -> list[float]:
    """p corrected for the number of claims (Holm, 1979)."""
    order, out, most = np.argsort(chances), [0.0] * len(chances), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(chances) - rank) * chances[i]))
        out[i] = most
    return out
