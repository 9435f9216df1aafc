"""Q-Bench (LLVisionQA) through LLaVA's general program: its questions in, its submission file and accuracy out.

LLaVA's own script calls a module that its repository does not have. The prompt here is LLaVA-1.5's for multiple choice
(our choice); the answers file holds each of Q-Bench's records with the model's "response", as its leaderboard asks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

LETTERS = "ABCDEFGH"
ASK = "Answer with the option's letter from the given choices directly."


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
    letter = re.match(r"\(?([A-H])\b", response.strip())
    return LETTERS.index(letter[1]) if letter and LETTERS.index(letter[1]) < len(candidates) else None


def submission(records: list[dict], answers: list[dict]) -> tuple[list[dict], float | None]:
    """Q-Bench's records with "response", and the accuracy where the right answers are known (the dev split).

    Raises:
        ValueError: a record without its answer.
    """
    said = {answer["question_id"]: answer["text"] for answer in answers}
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
    records = json.loads(args.records.read_text(encoding="utf-8"))
    if args.questions:
        _write(args.questions, questions(records))
    if args.answers:
        answers = [json.loads(line) for line in args.answers.read_text(encoding="utf-8").splitlines()]
        lines, accuracy = submission(records, answers)
        _write(args.submission, lines)
        print("accuracy: the right answers are not public" if accuracy is None else f"accuracy: {accuracy:.4f}")


def _write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
