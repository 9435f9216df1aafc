"""MM-Vet (arXiv 2308.02490): its scorer asks GPT-4; here its file is made."""

from __future__ import annotations

from . import Answers, Score


def mmvet(answers: Answers) -> Score:
    """No figures; the submission is {"v1_ID": answer}."""
    return Score({}, {}, {f"v1_{name}": record["text"] for name, record in answers.items()})
