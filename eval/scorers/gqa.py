"""GQA (arXiv 1902.09506): exact answers, as LLaVA submits them."""

from __future__ import annotations

import json
from pathlib import Path

from . import Answers, Score, answered, mean


def gqa(answers: Answers, ground_truth: Path) -> Score:
    """Accuracy in percent, of all, of yes/no and choice questions ("binary") and of the others ("open")."""
    truth = json.loads(ground_truth.read_text(encoding="utf-8"))
    per_item, by_kind, submission = {}, {"binary": [], "open": []}, []
    for name, entry in truth.items():
        said = answered(name, answers, str(ground_truth))["text"].rstrip(".").lower()
        submission.append({"questionId": name, "prediction": said})
        per_item[name] = float(said == entry["answer"])
        structure = entry.get("types", {}).get("structural", "query")
        by_kind["open" if structure == "query" else "binary"].append(per_item[name])
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    figures |= {kind: 100 * mean(values) for kind, values in by_kind.items() if values}
    return Score(figures, per_item, submission)
