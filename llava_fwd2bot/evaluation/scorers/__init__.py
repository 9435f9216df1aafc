"""Scores of answers that exist, in the official formats: `fwd2bot eval score BENCHMARK --answers … --ground-truth …`.

A scorer maps LLaVA's answers ({id: record}) and the benchmark's own files to a `Score`. It parses an answer exactly as
the benchmark's official script does, so that scores are comparable with those in papers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from ...files.records import read_records
from ..results import Score as Score

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
    "mmvet": ("mmvet", "mmvet", None, False),  # scored elsewhere by GPT-4; only the submission is written
    "own": ("own", "own", "your file of {question_id, answer} lines", False),
}
MADE_WITH = {"k": "k", "codec": "codecs", "fingerprint": "fingerprints"}  # of answers that must not be mixed
MATCHES = ("exact", "soft", "yes-no", "choice")  # how answers to your own questions are compared

Answers = dict[Any, dict[str, Any]]  # question_id → LLaVA's record


@dataclass
class Hit:
    """A question's score in [0, 1], by its key in `per_item`; its groups, one of each grouping; its image."""

    key: str
    score: float
    groups: Sequence[str] = ()
    image: Any = None


def scorer(name: str) -> Callable[..., Score]:
    """The scorer of a benchmark; it raises ValueError also for files of the wrong format.

    Raises:
        ValueError: there is no scorer of that name.
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
                f"{named}: not in the format of {name}'s files ({type(error).__name__}: {error}). The ground truth "
                f"is {truth}."
            ) from error

    return checked


def read_answers(paths: Sequence[Path], key: str = "question_id", empty_is_wrong: bool = False) -> Answers:
    """LLaVA's answers by `question_id`, from one file or from the parts that several GPUs wrote.

    Args:
        key: the field that identifies an answer; "question_id+prompt" combines two.
        empty_is_wrong: accept empty answers, which every scorer counts as wrong (`is_blank`).

    Raises:
        ValueError: a line is incomplete, there is no line, an id occurs twice, an answer has no text or lacks a part of
            `key`, answers are empty, or they come from several models, numbers of tokens, codecs or checkpoints.
    """
    found: Answers = {}
    parts = key.split("+")
    for path in paths:
        for record in read_records(path, lines=True):
            if "question_id" not in record or not isinstance(record.get("text"), str):
                raise ValueError(
                    f"{path} has a record without question_id or text, so it is not an answers file of LLaVA."
                )
            for part in parts:
                if not isinstance(record.get(part), str if part == "prompt" else (str, int, float)):
                    raise ValueError(
                        f"{path}: the answer to {record['question_id']!r} has no {part!r}, which identifies "
                        "answers of this benchmark. Do they belong to another one?"
                    )
            name = tuple(record[part] for part in parts) if len(parts) > 1 else record[key]
            if name in found:
                raise ValueError(f"{path}: the answer to {name!r} occurs twice. Did two runs write to one file?")
            found[name] = record
    about = [(record.get("model_id"), metadata_of(record)) for record in found.values()]
    several = {"models": {str(model) for model, _ in about}}
    several |= {what: {str(own.get(name)) for _, own in about} for name, what in MADE_WITH.items()}
    for what, values in several.items():
        if len(values) > 1:
            raise ValueError(
                f"The answers come from several {what}: {', '.join(sorted(values))}. Score each separately."
            )
    empty = [name for name, record in found.items() if is_blank(record)]
    if empty and not empty_is_wrong:
        shown = ", ".join(repr(name) for name in empty[:5])
        raise ValueError(
            f"{len(empty)} of {len(found)} answers are empty, the first: {shown}. Remove them from the file and answer "
            "them again, or count them as wrong with --empty-is-wrong."
        )
    return found


def metadata_of(record: dict[str, Any]) -> dict[str, Any]:
    """What `eval answer` wrote about how an answer was made; {} for answers of LLaVA's own programs."""
    return record["metadata"] if isinstance(record.get("metadata"), dict) else {}


def is_blank(record: dict[str, Any]) -> bool:
    """Whether an answer is empty. Empty answers are wrong, even where the official script accepts them."""
    return not record["text"].strip()


def check_names(
    names: Collection[Any], answers: Answers, source: str, others: Collection[Any] = (), complete: bool = True
) -> None:
    """Checks that the questions of `source` have different names, one answer each, and that there is no other answer.

    Args:
        others: names of questions that may be answered, and are not scored. complete: every question needs an answer.

    Raises:
        ValueError: a name occurs twice, a question has no answer, or an answer belongs to no question.
    """
    check_unique(names, source)
    absent = [name for name in names if name not in answers] if complete else []
    if absent:
        raise ValueError(f"There is no answer to question {absent[0]!r} of {source}. Is the run complete?")
    known = {*names, *others}
    other = [name for name in answers if name not in known]
    if other:
        shown = ", ".join(map(repr, other[:3]))
        raise ValueError(
            f"{len(other)} of {len(answers)} answers are to questions that {source} does not have, the first: {shown}. "
            "Do both belong to the same benchmark and split?"
        )


def check_complete(names: Collection[Any], answers: Answers, what: str) -> None:
    """Raises ValueError if a question of `names` (described by `what`) has no answer."""
    absent = [name for name in names if name not in answers]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(names)} {what} have no answer, the first: {absent[0]!r}. Is the run complete?"
        )


def check_unique(names: Iterable[Any], source: str) -> None:
    """Raises ValueError if a name occurs twice: one would replace the other, or count double."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{source}: {name!r} occurs twice. Remove one of them.")
        seen.add(name)


def summed(hits: Sequence[Hit], source: str, main: str = "accuracy") -> Score:
    """The mean score in percent, over all questions (the figure `main`) and over those of each group.

    Raises:
        ValueError: a group has the name of a figure or of a group of another grouping.
    """
    images = [hit.image for hit in hits]
    found = Score({main: percentage(hits)}, {hit.key: hit.score for hit in hits})
    found.groups = images if any(images) else None
    taken = {"accuracy", "circular"}
    for names in zip(*(hit.groups for hit in hits), strict=True):
        grouping = dict.fromkeys(name for name in names if name)
        if both := taken & grouping.keys():
            raise ValueError(f"{source} has a group named {min(both)!r}, the name of another score. Rename it.")
        taken |= grouping.keys()
        for group in grouping:
            own = [hit for hit, name in zip(hits, names, strict=True) if name == group]
            found.figures[group], found.counts[group] = percentage(own), len(own)
    return found


def percentage(hits: Sequence[Hit]) -> float:
    return 100 * sum(hit.score for hit in hits) / len(hits) if hits else float("nan")
