"""GQA (arXiv 1902.09506): exact answers, as LLaVA submits them."""

from __future__ import annotations

import json
from pathlib import Path

from . import Answers, Score, answered, mean, strangers


def gqa(answers: Answers, ground_truth: Path) -> Score:
    """Accuracy in percent, of all, of yes/no and choice questions ("binary") and of the others ("open")."""
    truth = json.loads(ground_truth.read_text(encoding="utf-8"))
    truth = {name: entry for name, entry in truth.items() if entry.get("isBalanced", True)}  # as the official script
    if not truth:
        raise ValueError(f"{ground_truth} holds no question.")
    strangers(answers, truth, str(ground_truth))
    per_item, by_kind, submission = {}, {"binary": [], "open": []}, []
    for name, entry in truth.items():
        if "answer" not in entry:
            raise ValueError(f"{ground_truth}: question {name!r} has no answer: it is a file without ground truth.")
        said = answered(name, answers, str(ground_truth))["text"].rstrip(".").lower()
        submission.append({"questionId": name, "prediction": said})
        per_item[name] = float(said == entry["answer"])
        structure = entry.get("types", {}).get("structural", "query")
        by_kind["open" if structure == "query" else "binary"].append(per_item[name])
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    figures |= {kind: 100 * mean(values) for kind, values in by_kind.items() if values}
    return Score(figures, per_item, submission)
