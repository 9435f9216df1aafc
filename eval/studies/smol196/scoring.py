"""From answers as token numbers to a score for each question, and from scores to shares with intervals.

A share is (x − floor) / (bound − floor): the floor of a task is the better of a blind lookup and of the bound shown
another picture, the bound is the dense recipe, trained as long as the compressors. What is averaged over tasks is the
share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import metrics
from eval.studies.smol196.tasks import TASKS, Item
from llava_fwd2bot.evaluation.resample import ROUNDS

MEASURES = 25  # points from floor to bound, from which on a task counts


def decoder(vocabulary: Sequence[int], tokenizer: Any, end: int) -> Callable[[np.ndarray], list[str]]:
    """Rows of the study's token numbers → texts, up to the end mark."""
    numbers = np.asarray(vocabulary)

    def decode(rows: np.ndarray) -> list[str]:
        texts = []
        for row in rows:
            stops = np.flatnonzero(row == end)
            texts.append(numbers[row[: stops[0]] if len(stops) else row].tolist())
        return [text.strip() for text in tokenizer.batch_decode(texts, skip_special_tokens=True)]

    return decode


def letters(said: str, truth: str) -> float:
    """Share of the letters that were read: 1 − edit distance over the longer text's length, at least 0."""
    a, b = (re.sub(r"[^a-z ]", "", text.lower()) for text in (said, truth))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return max(0.0, 1 - row[-1] / max(len(a), len(b), 1))


def score(items: Sequence[Item], variants: Sequence[Sequence[str]]) -> np.ndarray:
    """One number per question, in hundredths: CIDEr, letters, or right and wrong: [variants, questions]

    Captions of all variants are scored at once: each brings the same references, which changes nothing but the time.
    """
    out = np.zeros((len(variants), len(items)))
    for task in TASKS:
        at = [i for i, item in enumerate(items) if item.task == task]
        if not at:
            continue
        texts = [said[i] for said in variants for i in at]
        truth = [items[i].truth for i in at] * len(variants)
        if task in ("caption", "at"):
            found = metrics.caption_scores(texts, truth)["per_image"]
        elif task == "words":
            found = [letters(a, b[0]) for a, b in zip(texts, truth, strict=True)]
        elif task in ("exists", "any"):
            found = metrics.yes_no(texts, [t[0] for t in truth])["per_item"]
        else:
            found = metrics.exact(texts, [t[0] for t in truth])
        out[:, at] = 100 * np.asarray(found).reshape(len(variants), -1)
    return out


@dataclass
class Table:
    """Scores of all runs on the same questions.

    Attributes:
        scores: (run, variant) → one score per question; variant is k as text, "wrong", "prune4", ….
        blind: scores of the lookup. task, picture: of each question.
    """

    scores: dict[tuple[str, str], np.ndarray]
    blind: np.ndarray
    task: np.ndarray
    picture: np.ndarray

    def __post_init__(self) -> None:
        self.tasks = [t for t in TASKS if (self.task == t).any()]
        pictures, at = np.unique(self.picture, return_inverse=True)
        self._member = np.zeros((len(self.tasks), len(pictures)))  # questions of a task about a picture
        for number, task in enumerate(self.tasks):
            np.add.at(self._member[number], at[self.task == task], 1)
        self._at = at
        # pictures asked the same tasks are drawn among themselves, so that no task is left without one
        kinds = np.unique((self._member > 0).T, axis=0, return_inverse=True)[1].ravel()
        generator = np.random.default_rng(0)
        self._drawn = np.zeros((ROUNDS, len(pictures)))
        for kind in np.unique(kinds):
            mine = np.flatnonzero(kinds == kind)
            self._drawn[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), ROUNDS)
        self._drawn = np.concatenate([np.ones((1, len(pictures))), self._drawn])  # row 0 is what was measured
        self._asked = self._drawn @ self._member.T  # [1 + ROUNDS, tasks]

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means of each task, as measured and as drawn anew from the pictures: [1 + ROUNDS, tasks]"""
        sums = np.zeros_like(self._member)
        for number, task in enumerate(self.tasks):
            np.add.at(sums[number], self._at[self.task == task], values[self.task == task])
        return self._drawn @ sums.T / np.maximum(self._asked, 1e-9)

    def floor_and_bound(self) -> tuple[np.ndarray, np.ndarray]:
        """[1 + ROUNDS, tasks] each; without the dense recipe, the base is the bound."""
        bound = next(run for run in (*(r for r, _ in self.scores if r.startswith("dense")), "untrained-dense"))
        wrong = self.means(self.scores[bound, "wrong"])
        return np.maximum(wrong, self.means(self.blind)), self.means(self.scores[bound, "k0"])

    def measuring(self) -> list[bool]:
        """Which tasks measure vision: those whose bound is well above its floor."""
        floor, bound = self.floor_and_bound()
        return list(bound[0] - floor[0] >= MEASURES)

    def shares(self, run: str, variant: str) -> np.ndarray:
        """Shares of each task in hundredths, [1 + ROUNDS, tasks]"""
        floor, bound = self.floor_and_bound()
        room = np.where(np.abs(bound - floor) < 1e-9, np.nan, bound - floor)
        return 100 * (self.means(self.scores[run, variant]) - floor) / room

    def overall(self, run: str, variant: str) -> np.ndarray:
        """Mean share over the tasks that measure vision, [1 + ROUNDS]

        Raises:
            ValueError: there is no such task.
        """
        if not any(self.measuring()):
            raise ValueError(f"no task's bound is {MEASURES} points above its floor: nothing here measures vision")
        return self.shares(run, variant)[:, self.measuring()].mean(1)


def read_table(folder: Path, decode: Callable[[np.ndarray], list[str]]) -> tuple[Table, dict[str, dict[str, Any]]]:
    """Scores and results of every run in `folder`/runs, with `folder`/truth.json."""
    known = json.loads((folder / "truth.json").read_text())["items"]
    items = [Item(i["task"], i["question"], i["truth"]) for i in known]
    scores, results = {}, {}
    for file in sorted((folder / "runs").glob("*/result.json")):
        run = file.parent.name
        results[run] = json.loads(file.read_text())
        if not (file.parent / "answers.npz").exists():
            continue
        with np.load(file.parent / "answers.npz", allow_pickle=False) as stored:
            answered = [variant for variant in stored.files if stored[variant].ndim == 2]
            found = score(items, [decode(stored[variant]) for variant in answered]) if answered else []
            scores.update({(run, variant): values for variant, values in zip(answered, found, strict=True)})
            results[run]["ranks"] = {name: stored[name] for name in stored.files if stored[name].ndim == 1}
    blind = score(items, [[i["blind"] for i in known]])[0]
    return Table(scores, blind, np.array([i.task for i in items]), np.array([i["picture"] for i in known])), results
