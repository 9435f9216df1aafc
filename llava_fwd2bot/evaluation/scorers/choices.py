"""Multiple choice by the letter of an option: ScienceQA, SEED-Bench, MMBench."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...files.text import read_json, read_table
from . import Answers, Score, answered, blank, complete, mean, once, strangers, with_groups

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
    """Accuracy in percent, of the questions that were asked with an image, which is the one in papers, and of all.

    As in LLaVA's script a question of text alone without an answer is a wrong one: the image questions may be run by
    themselves. A question with an image must have its answer.
    """
    problems = read_json(ground_truth / "problems.json")
    asked = read_json(ground_truth / "pid_splits.json")[split]
    source = f"split {split!r} of {ground_truth}"
    once(asked, source)
    strangers(answers, set(asked), source)
    complete([name for name in asked if problems[name].get("image")], answers, f"questions with an image in {source}")
    per_item, with_image = {}, {}
    for name in asked:
        if not isinstance(problems[name]["answer"], int):
            raise ValueError(f"{source}: the answer to {name!r} is {problems[name]['answer']!r}, no choice's number.")
        record = answers.get(name, {"text": "", "prompt": ""})
        if not isinstance(record.get("prompt"), str):
            raise ValueError(f"The answer to {name!r} has no prompt, which says whether it was asked with an image.")
        letter = letter_of(record["text"])
        chosen = LETTERS.index(letter) if letter and letter in LETTERS[: len(problems[name]["choices"])] else -1
        per_item[name] = float(chosen == problems[name]["answer"])
        # LLaVA's script writes the one, `eval answer` the other
        if "<image>" in record["prompt"] or record.get("image"):
            with_image[name] = per_item[name]
    figures = {"image": 100 * mean(list(with_image.values()))} if with_image else {}
    figures["accuracy"] = 100 * mean(list(per_item.values()))
    return Score(figures, with_image or per_item, {"accuracy": len(per_item)})


def seed(answers: Answers, ground_truth: Path) -> Score:
    """SEED-Bench's accuracy in percent: all, image, video, and each kind of question; an answer is one letter.

    As in LLaVA's script a question about a video without an answer is a wrong one, also in "video": the videos may not
    be at hand. A question about an image must have its answer.
    """
    data = read_json(ground_truth)
    source = str(ground_truth)
    kinds = {number: kind for kind, number in data["question_type"].items()}
    asked = {_id(question["question_id"]): question for question in data["questions"]}
    once([_id(question["question_id"]) for question in data["questions"]], source)
    once(map(_id, answers), "The answers, with numbers and texts as ids alike")
    said = {_id(name): record for name, record in answers.items()}
    strangers(said, asked, source)
    about_images = [name for name, question in asked.items() if question["data_type"] != "video"]
    complete(about_images, said, f"questions about images in {source}")
    per_item, by_data, by_kind, submission = {}, {}, {}, []
    for name, question in asked.items():
        number = question["question_type_id"]
        if number not in kinds:
            raise ValueError(f"{source}: question {name!r} is of type {number}, which its question_type does not name.")
        text = said[name]["text"] if name in said else ""
        per_item[str(name)] = float(text == question["answer"])
        submission.append({"question_id": question["question_id"], "prediction": text})
        by_data.setdefault(question["data_type"], []).append(per_item[str(name)])
        by_kind.setdefault(kinds[number], []).append(per_item[str(name)])
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    groups = [str(question.get("data_id", name)) for name, question in asked.items()]
    figures, counts = with_groups(figures, (by_data, by_kind), source)
    return Score(figures, per_item, counts, groups, submission, submission_lines=True)


def _id(name: Any) -> int | str:
    """An id as a number where it is one, as LLaVA's script takes it: "00100000" is 100000."""
    try:
        return int(str(name))
    except ValueError:
        return str(name)


# VLMEvalKit reads the table by pandas, which takes these for an empty field: an option "None" is no option there, and a
# question that it answers is always wrong.
MISSING = set("nan NaN -nan -NaN NA N/A n/a <NA> #NA #N/A None null NULL 1.#IND 1.#QNAN -1.#IND -1.#QNAN".split())
MISSING |= {"", "#N/A N/A"}
TURN = 1_000_000  # rows whose index differs by a multiple of it are one question, its options turned round


def reading(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, as VLMEvalKit's exact matching reads it: by its letter, or by its text.

    Its list of phrases by which some models refuse is left out.
    """
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
    """MMBench by exact matching (no GPT reads the answers): circular, where all turns must be right, and each row.

    Papers give the first. Of a table without turns there is the second alone.

    Categories, and the groups of them that the table has as "l2-category", are of circular hits, as officially; they
    are those of a question's first turn.

    Args:
        ground_truth: the TSV with the column "answer" (the dev split).

    Raises:
        ValueError: the table is empty, has an index twice, a question without its first turn, right answers to some
            rows only, or one that is no option; the model has not answered a row, or something else as well.
    """
    source = str(ground_truth)
    rows, circles, kinds, submission = {}, {}, {}, []
    for index, shown in _table(ground_truth):
        row = {name: value for name, value in shown.items() if value not in MISSING}
        record = answered(index, answers, source)
        submission.append({"index": index, "prediction": record["text"]})
        if index < TURN:
            kinds[index] = row
        if "answer" not in row:  # the test split, whose answers its server has
            continue
        if row["answer"] not in {*string.ascii_uppercase} or not shown.get(row["answer"]):
            raise ValueError(f"{source}: the answer {row['answer']!r} of {index} is none of its options. Correct it.")
        options = {letter: row[letter] for letter in string.ascii_uppercase if letter in row}
        rows[str(index)] = float(not blank(record) and reading(record["text"], options) == row["answer"])
        circles.setdefault(index % TURN, []).append(rows[str(index)])
    if not submission:
        raise ValueError(f"{source} holds no question. Is the file whole?")
    strangers(answers, {entry["index"] for entry in submission}, source)
    if not rows:
        return Score({}, submission=submission)
    if len(rows) < len(submission):
        first = next(entry["index"] for entry in submission if str(entry["index"]) not in rows)
        raise ValueError(
            f"{source}: {len(submission) - len(rows)} of {len(submission)} rows have no answer, the first: {first}. "
            "Put those that have one into a table of their own."
        )
    for index in circles:
        if index not in kinds:
            raise ValueError(f"{source} has turns of question {index}, but no row {index}. Is the file whole?")
    by_group, by_category = {}, {}
    for index, hits in circles.items():
        for groups, column in ((by_group, "l2-category"), (by_category, "category")):
            if column in kinds[index]:
                groups.setdefault(kinds[index][column], []).append(float(all(hits)))
    circular = {str(index): float(all(hits)) for index, hits in circles.items()}
    turned = len(circles) < len(rows)
    figures = {"circular": 100 * mean(list(circular.values()))} if turned else {}
    figures["accuracy"] = 100 * mean(list(rows.values()))
    figures, counts = with_groups(figures, (by_group, by_category), source)
    return Score(figures, circular if turned else rows, counts | {"accuracy": len(rows)}, submission=submission)


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Index and fields of each row, but for the image; ValueError where an index is there twice or no whole number."""
    seen = set()
    for line, row in read_table(path):
        index = row.get("index") or ""
        if not index.isdecimal():
            raise ValueError(f"{path}: row {line} has the index {index!r}, which must be a whole number.")
        if int(index) in seen:
            raise ValueError(f"{path}: the index {index} is there twice. Remove one of the two.")
        seen.add(int(index))
        yield int(index), {name: row[name] or "" for name in row if name not in (None, "image")}
