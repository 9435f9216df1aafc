"""MME (arXiv 2306.13394): two yes/no questions to an image; points for each right, and for both."""

from __future__ import annotations

from pathlib import Path

from . import Answers, Score, answered, mean

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
SUFFIXES = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def reading(text: str) -> str:
    """yes, no or other, by the first four letters, as MME's script takes an answer."""
    text = text.lower()  # blanks before it count, as there
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme(answers: Answers, ground_truth: Path) -> Score:
    """Points of perception (of 2,000), of cognition (of 800), and of each task (of 200).

    A sum is given where all of its tasks are there, and never of a part of them.

    Args:
        answers: by (question_id, prompt); a question_id is "task/file.png", as in LLaVA's llava_mme.jsonl.
        ground_truth: MME's folder: task/*.txt or task/questions_answers_YN/*.txt, two lines "question<TAB>answer".
    """
    said = {}
    for (name, prompt), record in answers.items():
        said[_stem(name), _question(prompt)] = record
    figures, per_item = {}, {}
    for task in (*PERCEPTION, *COGNITION):
        folder = ground_truth / task
        texts = sorted((folder / "questions_answers_YN").glob("*.txt")) or sorted(folder.glob("*.txt"))
        if not texts:
            continue
        hits, pairs = [], []
        for text in texts:
            whole = text.read_text(encoding="utf-8").splitlines()
            lines = [line.strip().split("\t") for line in whole if line.strip()]
            if len(lines) != 2 or any(len(line) != 2 or line[1].strip().lower() not in ("yes", "no") for line in lines):
                raise ValueError(f"{text} must hold two lines of a question, a tab, and Yes or No.")
            right = []
            for question, truth in lines:
                key = (f"{task}/{text.stem}", _question(question))
                right.append(float(reading(answered(key, said, str(ground_truth))["text"]) == truth.strip().lower()))
                per_item[" ".join(key)] = right[-1]
            hits += right
            pairs.append(float(sum(right) == 2))
        figures[task] = 100 * (mean(hits) + mean(pairs))
    if not figures:
        raise ValueError(f"{ground_truth} has no folder of a task of MME's: {', '.join((*PERCEPTION, *COGNITION))}.")
    unread = [key for key in said if " ".join(key) not in per_item]
    if unread:
        about = f"{len(unread)} of {len(said)} answers"
        raise ValueError(f"{about} are to questions that {ground_truth} has not, the first: {' '.join(unread[0])}.")
    groups = {"perception": PERCEPTION, "cognition": COGNITION}
    sums = {name: sum(figures[t] for t in own) for name, own in groups.items() if figures.keys() >= set(own)}
    return Score(sums | figures, per_item)


def _stem(name: str) -> str:
    path = Path(name)
    return f"{path.parts[0]}/{path.stem}"  # task/images/file.png and task/file.png are the same


def _question(prompt: str) -> str:
    for suffix in SUFFIXES:
        prompt = prompt.replace(suffix, "")
    return " ".join(prompt.split())
