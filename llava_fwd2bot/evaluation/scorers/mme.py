"""MME (arXiv 2306.13394): two yes/no questions per image; points for each correct answer, and for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files.text import read_lines
from . import Answers, Score, answer_to, check_names, check_unique

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
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
    figures, per_item, counts, parts, wanted = {}, {}, {}, [], set()
    for task in (*PERCEPTION, *COGNITION):
        folder = ground_truth / task
        texts = sorted((folder / "questions_answers_YN").glob("*.txt")) or sorted(folder.glob("*.txt"))
        if not texts:
            continue
        hits, pairs = [], []
        for text in texts:
            right = []
            for question, truth in _pair(text):
                key = (f"{task}/{text.stem}", question)
                wanted.add(key)
                right.append(float(parse_yes_no(answer_to(key, answer_by_key, str(ground_truth))["text"]) == truth))
                per_item[" ".join(key)] = right[-1]
                parts.append([key[0], task, int(right[-1])])
            hits += right
            pairs.append(float(sum(right) == 2))
        figures[task] = 100 * (sum(hits) / len(hits) + sum(pairs) / len(pairs))
        counts[task] = len(hits)
    if not figures:
        raise ValueError(f"{ground_truth} has no folder of an MME task: {', '.join((*PERCEPTION, *COGNITION))}.")
    check_names(wanted, answer_by_key, str(ground_truth))
    groups = {"perception": PERCEPTION, "cognition": COGNITION}
    sums = {name: sum(figures[t] for t in own) for name, own in groups.items() if figures.keys() >= set(own)}
    counts |= {name: sum(counts[t] for t in groups[name]) for name in sums}
    shown = sums | figures
    first = groups.get(next(iter(shown)), [next(iter(shown))])  # the tasks that the first figure is made of
    own = {"kind": "mme", "items": [part for part in parts if part[1] in first]}
    return Score(shown, per_item, counts, parts=own)


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
