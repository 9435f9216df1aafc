"""Scores of answers that exist, in the official formats: `fwd2bot eval score BENCHMARK --answers … --ground-truth …`.

A scorer is a function of LLaVA's answers ({id: record}) and of the benchmark's own files, and gives a `Score`. Each
reads an answer as the benchmark's official script does, oddities included, so that the figures are the ones in papers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from ...files.records import read_records

# name → (module, function, what --ground-truth is (None: it takes none), whether --questions is needed)
SCORERS: dict[str, tuple[str, str, str | None, bool]] = {
    "pope": ("pope", "pope", "the folder of coco_pope_*.json", True),
    "textvqa": ("vqa", "textvqa", "TextVQA_0.5.1_val.json", False),
    "vqav2": ("vqa", "vqav2", "v2_mscoco_val2014_annotations.json", False),
    "vizwiz": ("vqa", "vizwiz", "VizWiz's val.json", True),
    "gqa": ("gqa", "gqa", "testdev_balanced_questions.json", False),
    "mme": ("mme", "mme", "MME_Benchmark_release_version", False),
    "scienceqa": ("choices", "scienceqa", "the folder of problems.json and pid_splits.json", False),
    "seed": ("choices", "seed", "SEED-Bench.json", False),
    "mmbench": ("choices", "mmbench", "mmbench_dev_20230712.tsv, or another with answers", False),
    "mmvet": ("mmvet", "mmvet", None, False),  # what is written is for its own scorer, which asks GPT-4
    "own": ("own", "own", "your file of {question_id, answer} lines", False),
}
MATCHES = ("exact", "soft", "yes-no", "choice")  # how answers to questions of one's own are compared


@dataclass
class Score:
    """Figures as the official script prints them, the main one first, and what each item adds to that one."""

    figures: dict[str, float]
    per_item: dict[str, float] = field(default_factory=dict)
    groups: list[Any] | None = None  # of each item, its image, where an image has several: they are not independent
    submission: Any = None  # what the benchmark's server or own scorer takes, where there is such a thing
    submission_lines: bool = False  # whether it takes JSON lines, not one JSON
    note: str | None = None  # what whoever sends the submission should know


Answers = dict[Any, dict[str, Any]]  # question_id → LLaVA's record


def scorer(name: str) -> Callable[..., Score]:
    """The function of a benchmark, which raises ValueError as well where its files are of another form.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SCORERS:
        raise ValueError(f"There is no scorer {name!r}. There are: {', '.join(SCORERS)}.")
    module, function, truth, _ = SCORERS[name]
    score = getattr(import_module(f"{__name__}.{module}"), function)

    @wraps(score)
    def checked(answers: Answers, **files: Any) -> Score:
        try:
            return score(answers, **files)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            named = ", ".join(map(str, files.values()))
            raise ValueError(
                f"{named}: not of the form of {name}'s files ({type(error).__name__}: {error}). The ground truth is "
                f"{truth}."
            ) from error

    return checked


def read_answers(paths: Sequence[Path], key: str = "question_id", empty_is_wrong: bool = False) -> Answers:
    """LLaVA's answers out of one file or the parts of several GPUs, by `question_id`.

    Args:
        key: another name of what tells the answers apart; "question_id+prompt" takes both.
        empty_is_wrong: let empty answers through; every scorer counts them as wrong (`blank`).

    Raises:
        ValueError: a line cut off, no line, an id twice, an answer without text or a part of `key`, empty answers,
            answers of several models, numbers of tokens or checkpoints.
    """
    found: Answers = {}
    told: dict[str, set[str]] = {"models": set(), "k": set(), "fingerprints": set()}
    empty: list[Any] = []
    for path in paths:
        for record in read_records(path, lines=True):
            if "question_id" not in record or not isinstance(record.get("text"), str):
                raise ValueError(
                    f"{path} holds a record without question_id or text: it is no answers file of LLaVA's."
                )
            for part in key.split("+"):
                if not isinstance(record.get(part), str if part == "prompt" else (str, int, float)):
                    raise ValueError(
                        f"{path}: the answer to {record['question_id']!r} has no {part!r}, by which answers are told "
                        "apart here. Are they to another benchmark?"
                    )
            name = tuple(record[part] for part in key.split("+")) if "+" in key else record[key]
            if name in found:
                raise ValueError(f"{path}: the answer to {name!r} is there twice. Were two runs written into one file?")
            found[name] = record
            about = record["metadata"] if isinstance(record.get("metadata"), dict) else {}
            own = (record.get("model_id"), about.get("k"), about.get("fingerprint"))
            for values, value in zip(told.values(), own, strict=True):
                values.add(str(value))
            if blank(record):
                empty.append(name)
    for what, values in told.items():
        if len(values) > 1:
            raise ValueError(f"The answers are of several {what}: {', '.join(sorted(values))}. Score each by itself.")
    if empty and not empty_is_wrong:
        shown = ", ".join(repr(name) for name in empty[:5])
        raise ValueError(
            f"{len(empty)} of {len(found)} answers are empty, the first: {shown}. Take them out of the file and answer "
            "them again, or count them as wrong with --empty-is-wrong."
        )
    return found


def blank(record: dict[str, Any]) -> bool:
    """Whether an answer is empty: it is wrong, whatever is right and however the official script would read it."""
    return not record["text"].strip()


def strangers(answers: Answers, asked: Collection[Any], source: str) -> None:
    """ValueError if there are answers to questions that the ground truth does not have."""
    other = [name for name in answers if name not in asked]
    if other:
        shown = ", ".join(map(repr, other[:3]))
        raise ValueError(
            f"{len(other)} of {len(answers)} answers are to questions that {source} does not have, the first: {shown}. "
            "Is one of the two of another split or benchmark?"
        )


def complete(names: Collection[Any], answers: Answers, what: str) -> None:
    """ValueError if one of the questions `names`, which are `what`, has no answer."""
    absent = [name for name in names if name not in answers]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(names)} {what} have no answer, the first: {absent[0]!r}. Is the run complete?"
        )


def once(names: Iterable[Any], source: str) -> None:
    """ValueError if a name is there twice: one of the two would silently stand for the other, or count double."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{source}: {name!r} is there twice. Remove one of the two.")
        seen.add(name)


def with_groups(
    figures: dict[str, float], groupings: Sequence[dict[str, list[float]]], source: str
) -> dict[str, float]:
    """The figures, and those of each group; ValueError where a group has the name of a figure or of another group."""
    taken = {"accuracy", "circular", *figures}
    for groups in groupings:
        if both := taken & groups.keys():
            raise ValueError(f"{source} has a group named {min(both)!r}, as another figure is. Rename it there.")
        taken |= groups.keys()
        figures = figures | {name: 100 * mean(groups[name]) for name in groups}
    return figures


def answered(name: Any, answers: Answers, source: str) -> dict[str, Any]:
    """The answer to question `name`; ValueError where there is none, so that no part is taken for the whole."""
    if name not in answers:
        raise ValueError(f"There is no answer to question {name!r} of {source}, which has others: is the run complete?")
    return answers[name]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
