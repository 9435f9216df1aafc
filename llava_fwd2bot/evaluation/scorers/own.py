"""Questions of one's own: answers compared with the right ones in the ways that benchmarks use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...files.records import read_records
from . import Answers, Score, answered, blank, mean, once, strangers

_LETTER = re.compile(r"\(?([A-Za-z])\)?(?=[.):,]|\s|$)")


def own(answers: Answers, ground_truth: Path, match: str = "exact") -> Score:
    """The share of right answers in percent.

    Args:
        ground_truth: JSON lines, or a JSON list, of {"question_id", "answer"}; `answer` is a text or a list of texts,
            and `image`, where it is there, says which items are not independent.
        match: "exact": the words are those of any right answer, without case, articles and punctuation. "soft": VQA
            accuracy, the share of three people who gave this answer, where ten answers are given; with fewer, the
            share of the right answers that it equals. "yes-no": the first of the two words. "choice": the letter that
            the answer begins with.

    Raises:
        ValueError: a question without an answer, or twice, or answers to other questions; a right answer that is
            neither yes nor no, or no letter.
    """
    records = read_records(ground_truth)
    for number, record in enumerate(records):
        if "question_id" not in record or "answer" not in record:
            raise ValueError(f"{ground_truth}: record {number} has no question_id or no answer.")
    names = [record["question_id"] for record in records]
    once(names, str(ground_truth))
    strangers(answers, set(names), str(ground_truth))
    scores: dict[str, float] = {}
    for record in records:
        right = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
        found = answered(record["question_id"], answers, str(ground_truth))
        text = found["text"]
        name = str(record["question_id"])
        scores[name] = 0.0 if blank(found) else _score(text, [str(r) for r in right], match, name, ground_truth)
    groups = [record.get("image") for record in records]
    return Score({"accuracy": 100 * mean(list(scores.values()))}, scores, groups if any(groups) else None)


def _score(text: str, right: Sequence[str], match: str, name: str, source: Path) -> float:
    from .vqa import agreement, normal

    if match in ("exact", "soft"):
        said, people = normal(text), [normal(r) for r in right]
        if match == "exact":
            return float(said in people)
        return agreement(said, people) if len(people) >= 10 else mean([float(said == p) for p in people])
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
