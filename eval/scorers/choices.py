"""Multiple choice by the letter of an option: ScienceQA, SEED-Bench, MMBench."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

from . import Answers, Score, answered, blank, mean, strangers

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

    As in LLaVA's script a question without an answer is a wrong one, as its image questions may be run alone; one with
    an image must have its answer.
    """
    problems = json.loads((ground_truth / "problems.json").read_text(encoding="utf-8"))
    asked = json.loads((ground_truth / "pid_splits.json").read_text(encoding="utf-8"))[split]
    strangers(answers, asked, f"split {split!r} of {ground_truth}")
    per_item, with_image = {}, []
    for name in asked:
        if problems[name].get("image"):
            answered(name, answers, str(ground_truth))
        record = answers.get(name, {"text": "", "prompt": ""})
        letter = letter_of(record["text"])
        chosen = LETTERS.index(letter) if letter and letter in LETTERS[: len(problems[name]["choices"])] else -1
        per_item[name] = float(chosen == problems[name]["answer"])
        if "<image>" in record["prompt"]:
            with_image.append(per_item[name])
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    return Score(figures | ({"image": 100 * mean(with_image)} if with_image else {}), per_item)


def seed(answers: Answers, ground_truth: Path) -> Score:
    """SEED-Bench's accuracy in percent: all, image, video, and each kind of question; an answer is one letter.

    As in LLaVA's script a question about a video without an answer is a wrong one, as the videos may not be at hand;
    one about an image must have its answer.
    """
    data = json.loads(ground_truth.read_text(encoding="utf-8"))
    names = {number: name for name, number in data["question_type"].items()}
    said = {_number(name): record["text"] for name, record in answers.items()}
    asked = [_number(question["question_id"]) for question in data["questions"]]
    if len(said) < len(answers) or len(set(asked)) < len(asked):
        raise ValueError(f"A question_id is there twice, in {ground_truth} or (as number and text) in the answers.")
    strangers(said, set(asked), str(ground_truth))
    per_item, groups, submission = {}, {}, []
    for question in data["questions"]:
        name = _number(question["question_id"])
        if question["data_type"] == "image":
            answered(name, said, str(ground_truth))
        hit = float(said.get(name) == question["answer"])
        per_item[name] = hit
        submission.append({"question_id": question["question_id"], "prediction": said.get(name, "")})
        for group in (question["data_type"], names[question["question_type_id"]]):
            groups.setdefault(group, []).append(hit)
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    return Score(_and(figures, groups, ground_truth), per_item, submission, submission_lines=True)


def _number(name: Any) -> str:
    """Ids as numbers where they are, so that "00100000" is 100000."""
    return str(int(name)) if str(name).isdigit() else str(name)


def _and(figures: dict[str, float], groups: dict[str, list[float]], source: Path) -> dict[str, float]:
    """The figures, and those of each group; ValueError where a group has the name of a figure."""
    taken = figures.keys() & groups.keys()
    if taken:
        raise ValueError(f"{source} has a group named {taken.pop()!r}, as a figure is.")
    return figures | {name: 100 * mean(hits) for name, hits in groups.items()}


# what pandas, which the official evaluation reads the table by, takes for an empty field
MISSING = {"", "nan", "NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "null", "NULL", "None", "-nan", "-NaN"}


def reading(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, as VLMEvalKit's exact matching reads it: by its letter, or by its text."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:  # its sign for none of them
        return None
    named = re.search(r"answer\s+is\s+\**([A-D])", text, re.IGNORECASE)
    if named and named[1].upper() in options:
        return named[1].upper()
    low = text.lower()
    if len(low) > 2 * sum(map(len, options.values())):
        return None
    told = [letter for letter, option in options.items() if option.lower() in low]
    return told[0] if len(told) == 1 else None


def mmbench(answers: Answers, ground_truth: Path) -> Score:
    """MMBench by exact matching (no GPT reads the answers): each row, and circular, where all turns must be right.

    Categories, and the groups of them that the table has as "l2-category", are of circular hits.

    Args:
        ground_truth: the TSV with the column "answer" (the dev split). Rows whose index differs by a multiple of a
            million are the same question with its options turned round.
    """
    csv.field_size_limit(sys.maxsize)  # images stand in the table as text
    rows, circles, kinds, submission = {}, {}, {}, []
    with ground_truth.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if not (row.get("index") or "").isdigit() or str(int(row["index"])) in rows:
                raise ValueError(f"{ground_truth}: the index {row.get('index')!r} is no number, or there twice.")
            index = int(row["index"])
            record = answered(index, answers, str(ground_truth))
            text = record["text"].strip()
            submission.append({"index": index, "prediction": text})
            if not row.get("answer"):
                continue
            options = {letter: row[letter] for letter in "ABCD" if (row.get(letter) or "") not in MISSING}
            if row["answer"] not in options:
                raise ValueError(f"{ground_truth}: the answer {row['answer']!r} of {index} is none of its options.")
            rows[str(index)] = float(not blank(record) and reading(text, options) == row["answer"])
            circles.setdefault(index % 1_000_000, []).append(rows[str(index)])
            if index < 1_000_000:
                kinds[index] = [row[name] for name in ("category", "l2-category") if row.get(name)]
    if not submission:
        raise ValueError(f"{ground_truth} holds no question.")
    strangers(answers, {entry["index"] for entry in submission}, str(ground_truth))
    if not rows:
        return Score({}, {}, submission)
    headless = [index for index in circles if index not in kinds]
    if headless:
        raise ValueError(f"{ground_truth} has turns of question {headless[0]}, but not the question itself.")
    by_kind: dict[str, list[float]] = {}
    for index, hits in circles.items():
        for kind in kinds[index]:
            by_kind.setdefault(kind, []).append(float(all(hits)))
    figures = {"accuracy": 100 * mean(list(rows.values()))}
    if len(circles) < len(rows):
        figures["circular"] = 100 * mean([float(all(hits)) for hits in circles.values()])
    return Score(_and(figures, by_kind, ground_truth), rows, submission)
