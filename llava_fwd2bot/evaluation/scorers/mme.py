"""MME (arXiv 2306.13394): two yes/no questions per image; points for each correct answer, and for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files.text import read_lines
from .. import resample
from . import Answers, Score, check_names, check_unique

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
GROUPS = {"perception": PERCEPTION, "cognition": COGNITION}
SUFFIXES = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def parse_yes_no(text: str) -> str:
    """yes, no or other, by the first four characters, as MME's script does."""
    start = text.lower()[:4]  # leading spaces count, as in the script
    return next((word for word in ("yes", "no") if word in start), "other")


def mme(answers: Answers, ground_truth: Path) -> Score:
    """Points for perception (of 2,000), cognition (of 800) and each task (of 200).

    A sum needs all of its tasks; with a missing folder it is left out, because it would look low. Without either sum
    the first score is that of the first task.

    Args:
        answers: by (question_id, prompt); a question_id is "task/file.png", as in LLaVA's llava_mme.jsonl.
        ground_truth: MME's folder: task/*.txt or task/questions_answers_YN/*.txt, two lines "question<TAB>answer".

    Raises:
        ValueError: a question has no answer or two, an answer has no question, or a file does not hold two questions.
    """
    keys = [(_stem(name), _question(prompt)) for name, prompt in answers]
    check_unique(keys, "The answers by image and question")
    answer_by_key = dict(zip(keys, answers.values(), strict=True))
    asked = {
        (f"{task}/{text.stem}", question): (task, truth)
        for task in (*PERCEPTION, *COGNITION)
        for text in _texts(ground_truth / task)
        for question, truth in _pair(text)
    }
    if not asked:
        raise ValueError(f"{ground_truth} has no folder of an MME task: {', '.join((*PERCEPTION, *COGNITION))}.")
    check_names(asked, answer_by_key, str(ground_truth))
    right = {key: int(parse_yes_no(answer_by_key[key]["text"]) == truth) for key, (_, truth) in asked.items()}
    items = [[key[0], task, right[key]] for key, (task, _) in asked.items()]
    tasks = {task: [item for item in items if item[1] == task] for task in dict.fromkeys(item[1] for item in items)}
    points = {task: resample.counts({"kind": "mme", "items": own}).value for task, own in tasks.items()}
    groups = {name: own for name, own in GROUPS.items() if points.keys() >= set(own)}
    figures = {name: sum(points[task] for task in own) for name, own in groups.items()} | points
    counts = {name: sum(len(tasks[task]) for task in groups.get(name, [name])) for name in figures}
    first = next(iter(figures))
    parts = {"kind": "mme", "items": [item for item in items if item[1] in groups.get(first, [first])]}
    return Score(figures, {" ".join(key): float(hit) for key, hit in right.items()}, counts, parts=parts)


def _texts(folder: Path) -> list[Path]:
    return sorted((folder / "questions_answers_YN").glob("*.txt")) or sorted(folder.glob("*.txt"))


def _pair(text: Path) -> list[tuple[str, str]]:
    """The two questions about an image, each with "yes" or "no"; ValueError if the file holds anything else."""
    lines = [line.strip().split("\t") for line in read_lines(text) if line.strip()]
    pair = [(_question(line[0]), line[1].strip().lower()) for line in lines if len(line) == 2]
    if not len(lines) == len(dict(pair)) == 2 or any(truth not in ("yes", "no") for _, truth in pair):
        raise ValueError(f"{text} must hold two lines, each a question, a tab, and Yes or No. Download it again.")
    return pair


def _stem(name: Any) -> str:
    task = str(name).split("/")[0]
    return f"{task}/{Path(str(name)).stem}"  # task/images/file.png and task/file.png are the same


def _question(prompt: str) -> str:
    for suffix in SUFFIXES:
        prompt = prompt.replace(suffix, "")
    return " ".join(prompt.split())
