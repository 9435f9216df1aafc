"""Multiple choice by the letter of an option: ScienceQA, SEED-Bench, MMBench."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...files.text import read_json, read_table
from . import Answers, Hit, Score, check_complete, check_names, check_unique, is_blank, percentage, summed

LETTERS = "ABCDE"


def letter_of(text: str) -> str | None:
    """The letter by LLaVA's script for ScienceQA: "A", "A. …" or "The answer is A."; None for anything else."""
    if text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def scienceqa(answers: Answers, ground_truth: Path, split: str = "test") -> Score:
    """Accuracy in percent on the questions with an image, which papers report, and on all.

    As in LLaVA's script, an unanswered question without an image counts as wrong, because a run may cover the image
    questions only. Every question with an image must be answered.
    """
    problems = read_json(ground_truth / "problems.json")
    wanted = read_json(ground_truth / "pid_splits.json")[split]
    source = f"split {split!r} of {ground_truth}"
    check_names(wanted, answers, source, complete=False)
    check_complete(
        [name for name in wanted if problems[name].get("image")], answers, f"questions with an image in {source}"
    )
    hits, with_image = [], []
    for name in wanted:
        if not isinstance(problems[name]["answer"], int):
            raise ValueError(f"{source}: the answer to {name!r} is {problems[name]['answer']!r}, no choice's number.")
        record = answers.get(name, {"text": "", "prompt": ""})
        if not isinstance(record.get("prompt"), str):
            raise ValueError(f"The answer to {name!r} has no prompt, so it is unknown whether it had an image.")
        letter = letter_of(record["text"])
        chosen = LETTERS.index(letter) if letter and letter in LETTERS[: len(problems[name]["choices"])] else -1
        hits.append(Hit(name, float(chosen == problems[name]["answer"])))
        # LLaVA's script writes <image> into the prompt, `eval answer` the field image
        if "<image>" in record["prompt"] or record.get("image"):
            with_image.append(hits[-1])
    found = summed(with_image, source, "image") if with_image else summed(hits, source)
    found.figures["accuracy"], found.counts["accuracy"] = percentage(hits), len(hits)
    return found


def seed(answers: Answers, ground_truth: Path) -> Score:
    """SEED-Bench's accuracy in percent: all, image, video, and each kind of question; an answer is one letter.

    As in LLaVA's script, an unanswered question about a video counts as wrong, because the videos may not be available.
    Every question about an image must be answered.
    """
    data, source = read_json(ground_truth), str(ground_truth)
    kinds = {number: kind for kind, number in data["question_type"].items()}
    wanted = [(_id(question["question_id"]), question) for question in data["questions"]]
    check_unique(map(_id, answers), "The answers, with numbers and texts as ids alike")
    by_id = {_id(name): record for name, record in answers.items()}
    check_names([name for name, _ in wanted], by_id, source, complete=False)
    about_images = [name for name, question in wanted if question["data_type"] != "video"]
    check_complete(about_images, by_id, f"questions about images in {source}")
    hits, submission = [], []
    for name, question in wanted:
        number = question["question_type_id"]
        if number not in kinds:
            raise ValueError(f"{source}: question {name!r} has type {number}, which question_type lacks.")
        text = by_id[name]["text"] if name in by_id else ""
        groups, image = (question["data_type"], kinds[number]), str(question.get("data_id", name))
        hits.append(Hit(str(name), float(text == question["answer"]), groups, image))
        submission.append({"question_id": question["question_id"], "prediction": text})
    found = summed(hits, source)
    found.submission, found.submission_lines = submission, True
    return found


def _id(name: Any) -> int | str:
    """An id as an int if it is numeric, as in LLaVA's script: "00100000" is 100000."""
    try:
        return int(str(name))
    except ValueError:
        return str(name)


# VLMEvalKit reads the table with pandas, which reads these as empty fields: an option "None" is no option there, and a
# question with that answer is always wrong.
MISSING = set("nan NaN -nan -NaN NA N/A n/a <NA> #NA #N/A None null NULL 1.#IND 1.#QNAN -1.#IND -1.#QNAN".split())
MISSING |= {"", "#N/A N/A"}
CATEGORIES = ("l2-category", "category")
TURN = 1_000_000  # rows whose indices differ by a multiple of it are one question with rotated options


def parse_option(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by VLMEvalKit's exact matching: by its letter, or by its text.

    VLMEvalKit's list of refusal phrases is left out.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:  # VLMEvalKit's letter for "none of them"
        return None
    named = re.search(r"answer\s+is\s+\**([A-D])", text, re.IGNORECASE)
    if named and named[1].upper() in options:
        return named[1].upper()
    low = text.lower()
    if len(low) > 2 * sum(map(len, options.values())):
        return None
    named_options = [letter for letter, option in options.items() if option.lower() in low]
    return named_options[0] if len(named_options) == 1 else None


def mmbench(answers: Answers, ground_truth: Path) -> Score:
    """MMBench by exact matching (no GPT parses the answers): circular accuracy and accuracy over rows.

    Circular accuracy, which papers report, counts a question as right if all its rotations are. A table without
    rotations has only the accuracy over rows. Categories ("category", "l2-category") use circular hits, as officially,
    and are those of a question's first rotation.

    Args:
        ground_truth: the TSV with the column "answer" (the dev split).

    Raises:
        ValueError: the table is empty, repeats an index, lacks a question's first rotation, has right answers for some
            rows only or one that is not an option; or a row is unanswered, or an answer belongs to no row.
    """
    source, rows = str(ground_truth), dict(_table(ground_truth))
    if not rows:
        raise ValueError(f"{source} holds no question. Is the file complete?")
    check_names(rows, answers, source)
    submission = [{"index": index, "prediction": answers[index]["text"]} for index in rows]
    unknown = [index for index, row in rows.items() if row.get("answer", "") in MISSING]
    if len(unknown) == len(rows):  # the test split, whose answers only the server has
        return Score({}, submission=submission)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} of {len(rows)} rows have no answer, the first: {unknown[0]}. "
            "Put the rows with an answer into a separate table."
        )
    hits: dict[int, list[Hit]] = {}  # of the rotations of each question
    for index, row in rows.items():
        if row["answer"] not in {*string.ascii_uppercase} or not row.get(row["answer"]):
            raise ValueError(f"{source}: the answer {row['answer']!r} of {index} is not one of its options.")
        if index % TURN not in rows:
            raise ValueError(
                f"{source} has rotations of question {index % TURN}, but no row {index % TURN}. Is the file complete?"
            )
        options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter, "") not in MISSING}
        right = not is_blank(answers[index]) and parse_option(answers[index]["text"], options) == row["answer"]
        hits.setdefault(index % TURN, []).append(Hit(str(index), float(right)))
    circular = []
    for index, own in hits.items():
        groups = [group if (group := rows[index].get(column, "")) not in MISSING else "" for column in CATEGORIES]
        circular.append(Hit(str(index), float(all(hit.score for hit in own)), groups))
    found, every = summed(circular, source, "circular"), [hit for own in hits.values() for hit in own]
    if len(circular) == len(rows):  # without rotations
        found.figures = {"accuracy": found.figures.pop("circular"), **found.figures}
    found.figures["accuracy"], found.counts["accuracy"] = percentage(every), len(rows)
    found.submission = submission
    return found


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Index and fields (without the image) of each row; ValueError if an index repeats or is not an integer."""
    seen = set()
    for line, row in read_table(path):
        index = row.get("index") or ""
        if not index.isdecimal():
            raise ValueError(f"{path}: row {line} has the index {index!r}, which must be an integer.")
        if int(index) in seen:
            raise ValueError(f"{path}: the index {index} occurs twice. Remove one of them.")
        seen.add(int(index))
        yield int(index), {name: row[name] or "" for name in row if name not in (None, "image")}
