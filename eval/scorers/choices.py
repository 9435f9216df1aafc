"""Multiple choice by the letter of an option: ScienceQA, SEED-Bench, MMBench."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

from . import Answers, Score, answered, mean

LETTERS = "ABCDE"


def letter_of(text: str) -> str | None:
    """ScienceQA's reading in LLaVA's script: "A", "A. …", or "The answer is A."; None for anything else."""
    if text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def scienceqa(answers: Answers, ground_truth: Path, split: str = "test") -> Score:
    """Accuracy in percent, of all and of the questions that were asked with an image.

    As in LLaVA's script a question without an answer is a wrong one (its image questions may be run alone).
    """
    problems = json.loads((ground_truth / "problems.json").read_text(encoding="utf-8"))
    asked = json.loads((ground_truth / "pid_splits.json").read_text(encoding="utf-8"))[split]
    per_item, with_image = {}, []
    for name in asked:
        record = answers.get(name, {"text": "", "prompt": ""})
        letter = letter_of(record["text"])
        chosen = LETTERS.index(letter) if letter and letter in LETTERS[: len(problems[name]["choices"])] else -1
        per_item[name] = float(chosen == problems[name]["answer"])
        if "<image>" in record["prompt"]:
            with_image.append(per_item[name])
    if not any(name in answers for name in asked):
        raise ValueError(f"None of the answers is to a question of split {split!r} in {ground_truth}.")
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    return Score(figures | ({"image": 100 * mean(with_image)} if with_image else {}), per_item)


def seed(answers: Answers, ground_truth: Path) -> Score:
    """SEED-Bench's accuracy in percent: all, image, video, and each kind of question; an answer is one letter.

    As in LLaVA's script a question without an answer (its videos may not be at hand) is a wrong one.
    """
    data = json.loads(ground_truth.read_text(encoding="utf-8"))
    names = {number: name for name, number in data["question_type"].items()}
    said = {str(name): record["text"] for name, record in answers.items()}
    per_item, groups, submission = {}, {}, []
    for question in data["questions"]:
        name = str(question["question_id"])
        hit = float(said.get(name) == question["answer"])
        per_item[name] = hit
        submission.append({"question_id": question["question_id"], "prediction": said.get(name, "")})
        for group in (question["data_type"], names[question["question_type_id"]]):
            groups.setdefault(group, []).append(hit)
    if not set(per_item) & set(said):
        raise ValueError(f"None of the answers is to a question of {ground_truth}.")
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    return Score(figures | {group: 100 * mean(hits) for group, hits in groups.items()}, per_item, submission)


def mmbench(answers: Answers, ground_truth: Path) -> Score:
    """MMBench by letters alone (no GPT reads the answers): each row, and circular, where all turns of a question count.

    Args:
        ground_truth: the TSV with the column "answer" (the dev split). Rows whose index differs by a multiple of a
            million are the same question with its options turned round.
    """
    csv.field_size_limit(sys.maxsize)  # images stand in the table as text
    rows, circles, by_category, submission = {}, {}, {}, []
    with ground_truth.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            index = int(row["index"])
            text = answered(index, answers, str(ground_truth))["text"].strip()
            submission.append({"index": index, "prediction": text})
            if not row.get("answer"):
                continue
            options = [letter for letter in "ABCD" if row.get(letter) not in (None, "", "nan")]
            found = re.match(r"\(?([A-D])\b", text)
            rows[str(index)] = float(bool(found) and found[1] in options and found[1] == row["answer"])
            circles.setdefault(index % 1_000_000, []).append(rows[str(index)])
            by_category.setdefault(row.get("category", ""), []).append(rows[str(index)])
    if not rows:
        return Score({}, {}, submission)
    figures = {"accuracy": 100 * mean(list(rows.values()))}
    if len(circles) < len(rows):
        figures["circular"] = 100 * mean([float(all(hits)) for hits in circles.values()])
    figures |= {name: 100 * mean(hits) for name, hits in by_category.items() if name}
    return Score(figures, rows, submission)
