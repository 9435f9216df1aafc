"""GQA (arXiv 1902.09506): exact answers, as LLaVA submits them."""

from __future__ import annotations

from pathlib import Path

from ...files.text import read_json
from . import Answers, Score, answered, blank, mean, strangers


def gqa(answers: Answers, ground_truth: Path) -> Score:
    """Accuracy in percent, of all, of yes/no and choice questions ("binary") and of the others ("open").

    As in the official script only the balanced questions count. Answers to the others may be there; they are submitted.
    """
    truth = read_json(ground_truth)
    balanced = {name: entry for name, entry in truth.items() if entry.get("isBalanced", True)}
    if not balanced:
        raise ValueError(f"{ground_truth} holds no balanced question. Take testdev_balanced_questions.json.")
    strangers(answers, truth, str(ground_truth))
    per_item, by_kind, submission = {}, {"binary": [], "open": []}, []
    for name, entry in truth.items():
        if name not in balanced and name not in answers:
            continue
        record = answered(name, answers, str(ground_truth))
        said = record["text"].rstrip(".").lower()
        submission.append({"questionId": name, "prediction": said})
        if name not in balanced:
            continue
        if not entry.get("answer"):
            raise ValueError(f"{ground_truth}: question {name!r} has no answer. Is it a file without ground truth?")
        per_item[name] = float(not blank(record) and said == entry["answer"])
        structure = entry.get("types", {}).get("structural", "query")
        by_kind["open" if structure == "query" else "binary"].append(per_item[name])
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    figures |= {kind: 100 * mean(values) for kind, values in by_kind.items() if values}
    groups = [balanced[name].get("imageId", name) for name in per_item]
    counts = {kind: len(values) for kind, values in by_kind.items()}
    return Score(figures, per_item, counts, groups, submission)
