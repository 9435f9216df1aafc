"""Scores of the studies' short answers, each with one number per item; captions are scored as by the evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_fwd2bot.evaluation.metrics import caption_scores as caption_scores
from llava_fwd2bot.evaluation.scorers.pope import figures_of, says_no
from llava_fwd2bot.processing.normal import normal


def exact(answers: Sequence[str], truth: Sequence[str]) -> list[float]:
    """1.0 for each answer that equals the truth; lists with commas (DAQUAR) compare as sets; empty ones are wrong."""

    def parts(text: str) -> frozenset[str]:
        return frozenset(normal(part) for part in text.split(","))

    return [float(parts(a) == parts(b)) for a, b in zip(answers, truth, strict=True)]


def yes_no(answers: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """POPE's figures, with "yes" as the positive class and answers read as by its script; and `per_item`.

    An empty answer is wrong whatever the label, as in `eval score`; the script reads it as yes.
    """
    wanted = [label == "yes" for label in truth]
    pairs = zip(answers, wanted, strict=True)
    predicted = [not says_no(text) if text.strip() else not right for text, right in pairs]
    hits = [float(a == b) for a, b in zip(predicted, wanted, strict=True)]
    return {**figures_of(predicted, wanted), "per_item": hits}
