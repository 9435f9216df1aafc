"""POPE (arXiv 2305.10355): is the object there? "yes" is the positive."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...files.records import read_records
from . import Answers, Score, answered, blank, once, strangers

MOST_ASKED = 0.9  # LLaVA's question file lacks 90 of the 3,000 of POPE's category random


def says_no(text: str) -> bool:
    """As POPE's script reads an answer: up to the first full stop, commas aside, the words no, No or not say no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def object_of(question: str) -> str:
    """What is asked for in "Is there a cat in the image?"."""
    found = re.match(r"Is there an? (.+) in the ima\w*ge\?", question)
    return found[1] if found else question.split("\n")[0]


def figures_of(said: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes, of yes (True) and no."""
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    precision, recall = both / max(sum(said), 1), both / max(sum(truth), 1)
    return {
        "accuracy": sum(a == b for a, b in zip(said, truth, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes": sum(said) / len(said),
    }


def pope(answers: Answers, ground_truth: Path, questions: Path) -> Score:
    """F1 and its like for each category, and F1 and accuracy averaged over them.

    Args:
        ground_truth: the folder of coco_pope_{random,popular,adversarial}.json.
        questions: LLaVA's llava_pope_test.jsonl. Labels are found by image and object, not by order, as it lacks some
            of POPE's random category, and some of its questions are spelt otherwise ("imange").

    Raises:
        ValueError: a question has no answer or no label, an answer has no question, or the folder holds no such file.
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
                    "or another than before. Is the download whole?"
                )
    said: dict[str, list[bool]] = {}
    truth: dict[str, list[bool]] = {}
    figures, per_item = {}, {}
    asked = read_records(questions, lines=True)
    once([line["question_id"] for line in asked], str(questions))
    strangers(answers, {line["question_id"] for line in asked}, str(questions))
    for line in asked:
        category = line["category"]
        key = (category, line["image"], object_of(line["text"]))
        if key not in labels:
            raise ValueError(f"{ground_truth} has no label for {key[2]!r} in {line['image']} ({category}).")
        record = answered(line["question_id"], answers, str(questions))
        # The script takes what does not say no for yes, silence too. It is wrong here: the opposite of the label.
        right = labels[key] == "yes"
        yes = not right if blank(record) else not says_no(record["text"])
        said.setdefault(category, []).append(yes)
        truth.setdefault(category, []).append(right)
        per_item[str(line["question_id"])] = float(yes == right)
    for category in sorted({key[0] for key in labels}):
        known, own = sum(key[0] == category for key in labels), len(said.get(category, ()))
        if own < MOST_ASKED * known:
            raise ValueError(
                f"{questions} asks {own} of the {known} questions of {category} that {ground_truth} has labels for: a "
                "part is not taken for the whole. Give all questions, or a folder without that category."
            )
    by_category = {category: figures_of(said[category], truth[category]) for category in sorted(said)}
    for name in ("f1", "accuracy"):
        figures[name] = sum(own[name] for own in by_category.values()) / len(by_category)
    for category, own in by_category.items():
        figures.update({f"{category}_{name}": value for name, value in own.items()})
    return Score(figures, per_item)
