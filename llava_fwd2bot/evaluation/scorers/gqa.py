"""GQA (arXiv 1902.09506): exact answers, as LLaVA submits them."""

from __future__ import annotations

from pathlib import Path

from ...files.text import read_json
from . import Answers, Hit, Score, check_names, is_blank, summed


def gqa(answers: Answers, ground_truth: Path) -> Score:
    """Accuracy in percent: on all questions, on yes/no and choice questions ("binary"), and on the others ("open").

    As in the official script only balanced questions count. Answers to others are allowed, and are submitted.
    """
    truth, source = read_json(ground_truth), str(ground_truth)
    balanced = {name: entry for name, entry in truth.items() if entry.get("isBalanced", True)}
    if not balanced:
        raise ValueError(f"{source} holds no balanced question. Take testdev_balanced_questions.json.")
    check_names(balanced, answers, source, others=truth)
    hits = []
    for name, entry in balanced.items():
        if not entry.get("answer"):
            raise ValueError(f"{source}: question {name!r} has no answer. Is it a file without ground truth?")
        right = not is_blank(answers[name]) and _prediction(answers[name]["text"]) == entry["answer"]
        kind = "open" if entry.get("types", {}).get("structural", "query") == "query" else "binary"
        hits.append(Hit(name, float(right), (kind,), entry.get("imageId", name)))
    found = summed(hits, source)
    given = {name: answers[name]["text"] for name in truth if name in answers}
    found.submission = [{"questionId": name, "prediction": _prediction(text)} for name, text in given.items()]
    return found


def _prediction(text: str) -> str:
    return text.rstrip(".").lower()
