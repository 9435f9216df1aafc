"""MM-Vet (arXiv 2308.02490): its scorer uses GPT-4; this writes the scorer's input file."""

from __future__ import annotations

from . import Answers, Score, check_unique


def mmvet(answers: Answers) -> Score:
    """No scores; the submission is {"v1_ID": answer}."""
    check_unique(map(str, answers), "The answers, with numbers and texts as ids alike")
    named = [name for name in answers if str(name).startswith("v1_")]
    if named:
        raise ValueError(f"The ids have the prefix v1_ already ({named[0]}): give LLaVA's answers file.")
    return Score({}, submission={f"v1_{name}": record["text"] for name, record in answers.items()})
