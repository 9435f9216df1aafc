"""The report's own part: the share between floor and bound, (x − floor) / (bound − floor), and its mean over tasks.

The floor is the better of a blind lookup and of the base shown another picture, the bound is the base with all its
dense tokens. Tasks whose bound is not well above its floor do not measure vision and do not count.

Shapes: P pictures, B draws of them, S seeds; row 0 of [1 + B, …] is what was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.statistics import chance
from eval.studies.compare import Difference, Scores, welch
from eval.studies.rows import Rows
from eval.studies.smol196.recipes import BASE, BLIND, DENSE, POOLED, WRONG
from eval.studies.smol196.tasks import TASKS
from eval.studies.study import Study
from llava_fwd2bot.evaluation.resample import ROUNDS, bounds
from llava_fwd2bot.evaluation.tables import markdown

SHARE = "share"
MEASURES = 0.25  # from floor to bound, from which on a task counts


class Shares(Scores):
    """The figures of the tasks, and `share`, of which all are drawn on the same pictures: differences are paired."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.tasks = [task for task in TASKS if task in rows.tasks]
        asked = [np.asarray(rows.tasks[task].groups) for task in self.tasks]
        pictures = np.unique(np.concatenate(asked))
        self._at = [np.searchsorted(pictures, own) for own in asked]
        count = len(pictures)
        member = np.stack([np.bincount(at, minlength=count) for at in self._at]).astype(float)  # [tasks, P]
        # pictures asked the same tasks are drawn among themselves, so that no task is left without one
        kinds = np.unique((member > 0).T, axis=0, return_inverse=True)[1].ravel()
        generator = np.random.default_rng(0)
        drawn = np.zeros((ROUNDS, count))
        for kind in np.unique(kinds):
            mine = np.flatnonzero(kinds == kind)
            drawn[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), ROUNDS)
        self._drawn = np.concatenate([np.ones((1, count)), drawn])  # [1 + B, P]
        self._asked = self._drawn @ member.T  # [1 + B, tasks]
        self._known: dict[tuple[str, int], np.ndarray] = {}

    def means(self, row: str, k: int) -> np.ndarray:
        """Means of each task over seeds, [1 + B, tasks]"""
        if (row, k) not in self._known:
            items = [self.items(task, row, k).mean(0) for task in self.tasks]
            count = self._drawn.shape[1]
            sums = np.stack([np.bincount(a, weights=x, minlength=count) for a, x in zip(self._at, items, strict=True)])
            self._known[row, k] = self._drawn @ sums.T / np.maximum(self._asked, 1e-9)
        return self._known[row, k]

    def floor_and_bound(self) -> tuple[np.ndarray, np.ndarray]:
        """[1 + B, tasks] each"""
        return np.maximum(self.means(WRONG, 0), self.means(BLIND, 0)), self.means(BASE, 0)

    def measuring(self) -> np.ndarray:
        """Which tasks measure vision, [tasks]"""
        floor, bound = self.floor_and_bound()
        return bound[0] - floor[0] >= MEASURES

    def overall(self, row: str, k: int) -> np.ndarray | None:
        """Mean share over the tasks that measure vision, [1 + B]; None where there is none."""
        if not self.bounded() or any(self.items(task, row, k) is None for task in self.tasks):
            return None
        return self._share(self.means(row, k))

    def _share(self, means: np.ndarray) -> np.ndarray:
        floor, bound = (side[: len(means)] for side in self.floor_and_bound())
        chosen = self.measuring()
        return ((means - floor) / np.where(chosen, bound - floor, 1))[:, chosen].mean(1)

    def bounded(self) -> bool:
        """Whether floor and bound were measured, and a task lies between them."""
        known = ((BLIND, 0), (WRONG, 0), (BASE, 0))
        return all(self.items(t, *at) is not None for t in self.tasks for at in known) and bool(self.measuring().any())

    def of_seeds(self, row: str, k: int) -> np.ndarray:
        """The share of each seed, [S]"""
        means = np.stack([self.items(task, row, k).mean(1) for task in self.tasks], 1)  # [S, tasks]
        return np.concatenate([self._share(own[None]) for own in means])

    def spread(self, row: str, k: int) -> np.ndarray:
        """What the mean over seeds differs by when seeds are drawn anew, [B]; corrected for their small number."""
        own = self.of_seeds(row, k)
        if len(own) == 1:
            return np.zeros(ROUNDS)
        picked = np.random.default_rng([len(row), k]).integers(0, len(own), (ROUNDS, len(own)))
        return (len(own) / (len(own) - 1)) ** 0.5 * (own[picked].mean(1) - own.mean())

    # ------------------------------------------------------------------ as of Scores
    def ks(self, figure: str, row: str) -> list[int]:
        return super().ks(self.tasks[0] if figure == SHARE else figure, row)

    def items(self, figure: str, row: str, k: int) -> np.ndarray | None:
        return None if figure == SHARE else super().items(figure, row, k)

    def value(self, figure: str, row: str, k: int) -> float | None:
        if figure != SHARE:
            return super().value(figure, row, k)
        drawn = self.overall(row, k)
        return None if drawn is None else float(drawn[0])

    def interval(self, figure: str, row: str, k: int) -> tuple[float, float]:
        if figure != SHARE:
            return super().interval(figure, row, k)
        return bounds(self.overall(row, k)[1:] + self.spread(row, k))

    def compare(self, figure: str, ours: tuple[str, int], theirs: tuple[str, int], *more: Any) -> Difference | None:
        if figure != SHARE:
            return super().compare(figure, ours, theirs, *more)
        a, b = self.overall(*ours), self.overall(*theirs)
        if a is None or b is None:
            return None
        apart = a - b
        seeds = [own for own in (self.of_seeds(*ours), self.of_seeds(*theirs)) if len(own) > 1]
        if not seeds:
            return Difference(float(apart[0]), bounds(apart[1:]), chance(float(apart[0]), apart[1:]))
        parts = [(float(apart[1:].var(ddof=1)), self._drawn.shape[1] - 1)]
        parts += [(float(own.var(ddof=1)) / len(own), len(own) - 1) for own in seeds]
        interval = bounds(apart[1:] + self.spread(*ours) - self.spread(*theirs))
        return Difference(float(apart[0]), interval, welch(float(apart[0]), parts))


scores = Shares


def extra(study: Study, scores: Shares) -> str:
    """Whether the base's images matter: of each task floor, base, bound, and what untrained pooling to 16 keeps."""
    columns = {"blind": (BLIND, 0), "wrong image": (WRONG, 0), "base": (BASE, 0), "dense, trained": (DENSE, 0)}
    columns["untrained pooling, 16"] = (POOLED, 16)
    found = {title: 100 * scores.means(*at)[0] for title, at in columns.items()}
    rows = []
    for i, task in enumerate(scores.tasks):
        blind, wrong, base, _, pooled = (float(own[i]) for own in found.values())
        floor = max(wrong, blind)
        kept = 100 * (pooled - floor) / max(base - floor, 1e-9)
        told = f"{kept:.0f} %" if base - floor >= 5 else "no room"  # a share of less is noise
        met = base - wrong >= 25 and kept <= 85
        rows.append([task, *(f"{own[i]:.1f}" for own in found.values()), told, "yes" if met else "no"])
    table = markdown(["task", *columns, "keeps", "met"], rows)
    counted = [task for task, counts in zip(scores.tasks, scores.measuring(), strict=True) if counts]
    return f"### Does the base need the image?\n\n{table}\n\nShares are means over {', '.join(counted)}."
