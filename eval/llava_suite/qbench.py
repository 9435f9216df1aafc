"""Q-Bench (LLVisionQA) through LLaVA's general program: its questions in, its submission file and accuracy out.

LLaVA's own script calls a module that its repository does not have. The prompt here is LLaVA-1.5's for multiple choice
(our choice); the answers file holds each of Q-Bench's records with the model's "response", as its leaderboard asks.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from llava_fwd2bot.evaluation.tables import percent
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.text import json_line, read_any_json
from llava_fwd2bot.files.writing import write_text

LETTERS = "ABCDEFGH"
ASK = "Answer with the option's letter from the given choices directly."


def checked(records: Any, source: Path) -> list[dict]:
    """Q-Bench's records.

    Raises:
        ValueError: they are no list of records, or one lacks a field or has more options than there are letters.
    """
    if not isinstance(records, list) or not records:
        raise ValueError(f"{source} must hold a list of records, not {str(records)[:80]}")
    kinds = {"img_path": str, "question": str, "candidates": list}
    for i, record in enumerate(records):
        given = record if isinstance(record, dict) else {}
        wrong = [name for name, kind in kinds.items() if not isinstance(given.get(name), kind)]
        if wrong or not all(isinstance(text, str) for text in record["candidates"]):
            wrong = ", ".join(wrong) or "candidates"
            raise ValueError(f"{source}, record {i}: {wrong} missing or of another kind: {str(record)[:80]}")
        if len(record["candidates"]) > len(LETTERS):  # the rest could not be chosen
            told = f"{len(record['candidates'])} options, more than the letters {LETTERS[0]} to {LETTERS[-1]}"
            raise ValueError(f"{source}, record {i} has {told}.")
    return records


def questions(records: list[dict]) -> list[dict]:
    """LLaVA's question file of Q-Bench's records."""
    lines = []
    for i, record in enumerate(records):
        choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, record["candidates"], strict=False)]
        text = "\n".join([record["question"], *choices, ASK])
        lines.append({"question_id": i, "image": record["img_path"], "text": text})
    return lines


def chosen(response: str, candidates: list[str]) -> int | None:
    """Which candidate a response names, by its letter or its text; None if neither."""
    said = response.strip().rstrip(".").lower()
    exact = [i for i, text in enumerate(candidates) if text.strip().rstrip(".").lower() == said]
    if len(exact) == 1:  # first: "A lot" is a text, not the letter A
        return exact[0]
    letter = re.match(r"\(?([A-H])\b(.*)", response.strip(), re.DOTALL)
    if letter is None or (choice := LETTERS.index(letter[1])) >= len(candidates):
        return None
    # "B", "B.", "B - dark", "B\nbecause …" and "B Dark" name B; "A bit dark" names none
    ends = re.match(r"$|[.):;,]|\s*\n|\s+-", letter[2])
    return choice if ends or letter[2].strip().lower().startswith(candidates[choice].strip().lower()) else None


def submission(records: list[dict], answers: list[dict]) -> tuple[list[dict], float | None]:
    """Q-Bench's records with "response", and the accuracy where the right answers are known (the dev split).

    Raises:
        ValueError: a record has no answer, or two; an answer is to no record, or no text.
    """
    said: dict[int, str] = {}
    for number, answer in enumerate(answers, 1):
        name, text = answer.get("question_id"), answer.get("text")
        if type(name) is not int or not 0 <= name < len(records):
            raise ValueError(f"Answer {number} is to question {name!r}; records are 0 to {len(records) - 1}.")
        if name in said:
            raise ValueError(f"Record {name} has two answers: are the answers of two runs in one file?")
        if not isinstance(text, str):
            raise ValueError(f"The answer to record {name} must be a text, not {text!r}.")
        said[name] = text
    missing = [i for i in range(len(records)) if i not in said]
    if missing:
        raise ValueError(f"{len(missing)} of {len(records)} records have no answer, the first is record {missing[0]}.")
    lines = [{**record, "response": said[i]} for i, record in enumerate(records)]
    if not all("correct_ans" in record for record in records):
        return lines, None
    right = 0
    for line in lines:
        choice = chosen(line["response"], line["candidates"])
        right += choice is not None and line["candidates"][choice] == line["correct_ans"]
    return lines, right / len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="llvisionqa_dev.json or llvisionqa_test.json")
    parser.add_argument("--questions", type=Path, help="write LLaVA's question file here")
    parser.add_argument("--answers", type=Path, help="LLaVA's answers file, to write --submission from")
    parser.add_argument("--submission", type=Path)
    args = parser.parse_args()
    if (args.answers is None) != (args.submission is None):
        parser.error("--answers and --submission go together: the one is read, the other written")
    try:
        records = checked(read_any_json(args.records), args.records)
        if args.questions:
            _write(args.questions, questions(records))
        if args.answers:
            lines, accuracy = submission(records, read_records(args.answers, lines=True))
            _write(args.submission, lines)
            empty = [i for i, line in enumerate(lines) if not line["response"].strip()]
            if empty:
                shown = ", ".join(map(str, empty[:3]))
                told = f"{len(empty)} of {len(lines)} answers are empty, and wrong; the first: records {shown}"
                print(f"{parser.prog}: {told}", file=sys.stderr)
            shown = "the right answers are not public"
            if accuracy is not None:
                shown = f"{percent(accuracy, len(lines))} % (n = {len(lines):,})"
            print(f"accuracy: {shown}")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(map(json_line, lines)))


if __name__ == "__main__":
    main()
