"""Scores of the studies' short answers, each with one number per item; captions are scored as by the evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_fwd2bot.evaluation.metrics import caption_scores as caption_scores
from llava_fwd2bot.evaluation.scorers.pope import figures_of, says_no
from llava_fwd2bot.processing.normal import normal


def exact(answers: Sequence[str], truth: Sequence[str]) -> list[float]:
    """1.0 for each answer that equals the truth; lists with commas (DAQUAR) compare as sets; empty ones are wrong."""

    def parts(text: str) -> frozenset[str]:
        return frozenset(normal(part) for part in text.split(","))

    return [float(parts(a) == parts(b)) for a, b in zip(answers, truth, strict=True)]


def wups(answers: Sequence[str], truth: Sequence[str], threshold: float = 0.9) -> list[float] | None:
    """WUPS of each answer (Malinowski and Fritz, 2014): Wu-Palmer similarity of the words, matched both ways.

    A similarity below `threshold` is multiplied by 0.1. None if NLTK's WordNet is not installed
    (`python -m nltk.downloader wordnet`).
    """
    try:
        from nltk.corpus import wordnet

        wordnet.synsets("chair")
    except (ImportError, LookupError, OSError):
        return None
    known: dict[tuple[str, str], float] = {}

    def alike(a: str, b: str) -> float:
        if a == b:
            return 1.0
        if (a, b) not in known:
            first, second = (wordnet.synsets(word.replace(" ", "_"), pos="n") for word in (a, b))
            best = max((x.wup_similarity(y) or 0.0 for x in first for y in second), default=0.0)
            known[a, b] = best if best >= threshold else 0.1 * best
        return known[a, b]

    def one(answer: str, wanted: str) -> float:
        a, b = ([normal(part) for part in text.split(",")] for text in (answer, wanted))
        forth = np.prod([max(alike(x, y) for y in b) for x in a])
        back = np.prod([max(alike(x, y) for x in a) for y in b])
        return float(min(forth, back))

    return [one(a, b) for a, b in zip(answers, truth, strict=True)]


def yes_no(answers: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """POPE's figures, with "yes" as the positive class and answers read as by its script; and `per_item`.

    An empty answer is wrong whatever the label, as in `eval score`; the script reads it as yes.
    """
    wanted = [label == "yes" for label in truth]
    pairs = zip(answers, wanted, strict=True)
    predicted = [not says_no(text) if text.strip() else not right for text, right in pairs]
    hits = [float(a == b) for a, b in zip(predicted, wanted, strict=True)]
    return {**figures_of(predicted, wanted), "per_item": hits}
