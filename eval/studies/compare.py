"""Figures of a study's rows and the difference between two, with intervals and chances.

Items of one group are drawn together. Shapes: S seeds, N items, G groups.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.statistics import holm, over_seeds
from llava_fwd2bot.evaluation.resample import numbers
from llava_fwd2bot.extras import require

from .rows import Rows
from .study import Claim, Study


@dataclass
class Difference:
    """Of two figures, or their ratio: its 95 % interval, and the two-sided p of a difference of -margin (ratio: 1)."""

    value: float
    interval: tuple[float, float]
    p: float


class Scores:
    """Figures by name: a task, or TASK/PART."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.found: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
        for (task, row, k, seed), cell in sorted(rows.cells.items()):
            self.found.setdefault((task, row, k), {})[seed] = np.asarray(cell.scores)

    def ks(self, figure: str, row: str) -> list[int]:
        return sorted(k for task, name, k in self.found if (task, name) == (figure.split("/")[0], row))

    def items(self, figure: str, row: str, k: int) -> np.ndarray | None:
        """[S, N], or None where it was not measured."""
        task, _, part = figure.partition("/")
        seeds = self.found.get((task, row, k))
        if seeds is None:
            return None
        scores = np.stack(list(seeds.values()))
        return scores[:, self.rows.tasks[task].parts[part]] if part else scores

    def groups(self, figure: str) -> np.ndarray:
        task, _, part = figure.partition("/")
        groups = numbers(self.rows.tasks[task].groups)
        return groups[self.rows.tasks[task].parts[part]] if part else groups

    def value(self, figure: str, row: str, k: int) -> float | None:
        items = self.items(figure, row, k)
        return None if items is None else float(items.mean())

    def interval(self, figure: str, row: str, k: int) -> tuple[float, float]:
        items = self.items(figure, row, k)
        return over_seeds(items, np.zeros((1, items.shape[1])), self.groups(figure))

    def compare(
        self, figure: str, ours: tuple[str, int], theirs: tuple[str, int], margin: float = 0.0, ratio: bool = False
    ) -> Difference | None:
        """Ours against theirs, (row, k) each; None where one was not measured or there is no ratio."""
        a, b = self.items(figure, *ours), self.items(figure, *theirs)
        if a is None or b is None or (ratio and not b.any()):
            return None
        groups = self.groups(figure)
        value = a.mean() / b.mean() if ratio else a.mean() - b.mean()
        interval = over_seeds(a, b, groups, ratio=ratio)
        return Difference(float(value), interval, chance_over_seeds(a, b, groups, margin))


def chance_over_seeds(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, margin: float = 0.0) -> float:
    """Two-sided p of a t-test that the means differ by -margin.

    The variance of the difference has up to three parts: that over groups of items, and that over the seeds of either
    side where it has several.

    Args:
        ours, theirs: [S, N] of the same items.
    """
    apart = ours.mean(0) - theirs.mean(0)  # [N]
    number = numbers(groups)
    counts = np.bincount(number)
    beyond = np.bincount(number, weights=apart) - apart.mean() * counts  # [G]
    count = len(counts)
    parts = [(count / max(count - 1, 1) * float((beyond**2).sum()) / len(apart) ** 2, max(count - 1, 1))]
    parts += [(float(s.mean(1).var(ddof=1)) / len(s), len(s) - 1) for s in (ours, theirs) if len(s) > 1]
    return welch(float(apart.mean()) + margin, parts)


def welch(difference: float, parts: list[tuple[float, int]]) -> float:
    """Two-sided p of a difference whose variance is a sum of (variance, its degrees of freedom).

    The sum's degrees of freedom are Welch's and Satterthwaite's.
    """
    variance = sum(v for v, _ in parts)
    if variance == 0:
        return float(difference == 0)
    freedom = variance**2 / sum(v**2 / n for v, n in parts)
    student = require("scipy.stats", "eval", "A claim's p").t
    return float(2 * student.sf(abs(difference) / variance**0.5, freedom))


def judge(study: Study, scores: Any) -> list[dict[str, Any]]:
    """Every comparison of the study's claims: it holds, is refuted, or is open, where p ≥ 0.05 after Holm's correction.

    The correction is for all comparisons of a family of claims.

    Args:
        scores: `Scores`, or what has its `ks` and `compare`.
    """
    found, families = [], {}
    for claim in study.claims:
        for figure in claim.figures:
            for ours in claim.ours:
                for other in claim.others:
                    compared = _at_each_k(claim, figure, ours, other, scores)
                    found += compared
                    families.setdefault(claim.family, []).extend(compared)
    for family in families.values():
        for one, p in zip(family, holm([one["p"] for one in family]), strict=True):
            above = one["value"] > (1 if one["ratio"] else -one["margin"])
            one |= {"p_holm": p, "verdict": "open" if p >= 0.05 else "holds" if above else "refuted"}
    return found


def _at_each_k(claim: Claim, figure: str, ours: str, other: str, scores: Any) -> list[dict[str, Any]]:
    found = []
    for k in scores.ks(figure, ours) if claim.k is None else [claim.k]:
        at = k * claim.factor if claim.against is None else claim.against
        difference = scores.compare(figure, (ours, k), (other, at), claim.margin, claim.ratio)
        if difference is not None:
            about = {"claim": claim.says, "figure": figure, "ours": ours, "k": k, "against": other, "at": at}
            found.append({**about, **asdict(difference), "margin": claim.margin, "ratio": claim.ratio})
    return found
