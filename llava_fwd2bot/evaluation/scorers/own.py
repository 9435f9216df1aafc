"""Your own questions, with the ways of comparing answers that benchmarks use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...files.records import read_records
from . import Answers, Hit, Score, check_names, is_blank, summed
from .vqa import agreement, normal

_LETTER = re.compile(r"\(?([A-Za-z])\)?(?=[.):,]|\s|$)")


def own(answers: Answers, ground_truth: Path, match: str = "exact") -> Score:
    """The percentage of correct answers.

    Args:
        ground_truth: JSON lines, or a JSON list, of {"question_id", "answer"}; `answer` is a text or a list of texts.
            Items with the same `image` (optional) are resampled together for intervals.
        match: "exact": equal to any right answer, without case, articles and punctuation. "soft": VQA accuracy for ten
            or more right answers; for fewer, the share of them that the answer equals. "yes-no": the first yes or no in
            the answer. "choice": the letter that the answer begins with.

    Raises:
        ValueError: a question has no answer or occurs twice, an answer belongs to no question, or a right answer is not
            yes or no, or not a letter.
    """
    records = read_records(ground_truth)
    for number, record in enumerate(records):
        if "question_id" not in record or "answer" not in record:
            raise ValueError(f"{ground_truth}: record {number} has no question_id or no answer.")
    check_names([record["question_id"] for record in records], answers, str(ground_truth))
    hits = []
    for record in records:
        name, right = record["question_id"], record["answer"]
        right = list(map(str, right if isinstance(right, list) else [right]))
        text = answers[name]["text"]
        score = 0.0 if is_blank(answers[name]) else _score(text, right, match, str(name), ground_truth)
        hits.append(Hit(str(name), score, image=record.get("image")))
    return summed(hits, str(ground_truth))


def _score(text: str, right: Sequence[str], match: str, name: str, source: Path) -> float:
    if match in ("exact", "soft"):
        given, people = normal(text), [normal(r) for r in right]
        if match == "exact":
            return float(given in people)
        return agreement(given, people) if len(people) >= 10 else people.count(given) / len(people)
    read = _yes_or_no if match == "yes-no" else _letter
    truth = {read(r) for r in right}
    if None in truth:
        what = "yes or no" if match == "yes-no" else "a letter"
        raise ValueError(f"{source}: the right answer to {name!r} is not {what}: {right[0]!r}. Choose another --match.")
    return float(read(text) in truth)


def _yes_or_no(text: str) -> str | None:
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found[1] if found else None


def _letter(text: str) -> str | None:
    found = _LETTER.match(text.strip())
    return found[1].upper() if found else None
