"""POPE (arXiv 2305.10355): is an object in the image? "yes" is the positive class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...files.records import read_records
from . import Answers, Score, check_names, is_blank

MIN_ASKED = 0.9  # share; LLaVA's question file lacks 90 of the 3,000 questions of POPE's category random


def says_no(text: str) -> bool:
    """Whether an answer is a no by POPE's script: "no", "No" or "not" before the first full stop, without commas."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def object_of(question: str) -> str:
    """The object in "Is there a cat in the image?"."""
    found = re.match(r"Is there an? (.+) in the ima\w*ge\?", question)
    return found[1] if found else question.split("\n")[0]


def figures_of(predicted: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes; True is yes."""
    both = sum(a and b for a, b in zip(predicted, truth, strict=True))
    precision, recall = both / max(sum(predicted), 1), both / max(sum(truth), 1)
    return {
        "accuracy": sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(predicted),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes": sum(predicted) / len(predicted),
    }


def pope(answers: Answers, ground_truth: Path, questions: Path) -> Score:
    """F1, accuracy, precision, recall and share of yes per category, and F1 and accuracy averaged over categories.

    Args:
        ground_truth: the folder of coco_pope_{random,popular,adversarial}.json.
        questions: LLaVA's llava_pope_test.jsonl. Labels are matched by image and object, not by order: the file lacks
            some questions of the category random and spells some differently ("imange").

    Raises:
        ValueError: a question has no answer or no label, an answer has no question, or the folder has no such file.
    """
    labels = {}
    files = sorted(ground_truth.glob("coco_pope_*.json"))
    if not files:
        raise ValueError(f"{ground_truth} holds no coco_pope_*.json.")
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        for line in read_records(file, lines=True):
            key = (category, line["image"], object_of(line["text"]))
            if line["label"] not in ("yes", "no") or labels.setdefault(key, line["label"]) != line["label"]:
                raise ValueError(
                    f"{file}: the label of {key[2]!r} in {key[1]} is {line['label']!r}, which is neither yes nor no, "
                    "or contradicts an earlier one. Is the download complete?"
                )
    said: dict[str, list[tuple[bool, bool]]] = {}  # category → whether yes was said, and whether it is right
    figures, per_item, counts, parts = {}, {}, {}, []
    wanted = read_records(questions, lines=True)
    check_names([line["question_id"] for line in wanted], answers, str(questions))
    for line in wanted:
        category = line["category"]
        key = (category, line["image"], object_of(line["text"]))
        if key not in labels:
            raise ValueError(f"{ground_truth} has no label for {key[2]!r} in {line['image']} ({category}).")
        record = answers[line["question_id"]]
        # The script counts everything but a no as yes, also an empty answer. Here an empty answer is wrong.
        right = labels[key] == "yes"
        yes = not right if is_blank(record) else not says_no(record["text"])
        said.setdefault(category, []).append((yes, right))
        per_item[str(line["question_id"])] = float(yes == right)
        parts.append([line["image"], category, int(yes), int(right)])
    for category in sorted({key[0] for key in labels}):
        known, own = sum(key[0] == category for key in labels), len(said.get(category, ()))
        if own < MIN_ASKED * known:
            raise ValueError(
                f"{questions} asks {own} of the {known} questions of {category} that {ground_truth} has labels for. "
                "Give all questions, or a folder without that category."
            )
    by_category = {category: figures_of(*zip(*said[category], strict=True)) for category in sorted(said)}
    for name in ("f1", "accuracy"):
        figures[name] = sum(own[name] for own in by_category.values()) / len(by_category)
    for category, own in by_category.items():
        figures |= {f"{category}_{name}": value for name, value in own.items()}
        counts |= {f"{category}_{name}": len(said[category]) for name in own}
    return Score(figures, per_item, counts, parts={"kind": "pope", "items": parts})
