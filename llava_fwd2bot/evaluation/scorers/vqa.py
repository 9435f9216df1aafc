"""VQA accuracy (arXiv 1505.00468) with its normalisation of answers: TextVQA, VQAv2, VizWiz.

Ten people answered. An answer scores min(1, n/3), n of nine others agreeing, averaged over the ten choices of nine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files.records import read_records
from ...files.text import read_any_json, read_json
from . import Answers, Hit, Score, check_names, check_unique, is_blank, summed

_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
y'all you'd you'll you're you've"""
_MORE = """couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at"""
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")  # the first group is the official script's, and never matches


def _contractions() -> dict[str, str]:
    """Words without their apostrophe, mapped to the contraction."""
    found = {word.replace("'", ""): word for word in _ONE.split()}
    for word in _MORE.split():
        for at, letter in enumerate(word):
            if letter == "'":
                found[word[:at] + word[at + 1 :]] = word
    return {**found, "somebody'd": "somebodyd"}  # an oddity of the official table


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Removes marks next to a space, and all marks if a number has a comma; other marks become a space."""
    out, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", out, count=32)  # 32: the official script passes a flag as the count


def plain_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions with their apostrophes."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normal(answer: str) -> str:
    """An answer normalised by EvalAI's processor, which TextVQA's scorer and LLaVA's submissions use."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(_one_line(answer)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def agreement(answer: str, people: Sequence[str]) -> float:
    """The VQA accuracy of one answer: [0, 1]."""
    same = sum(person == answer for person in people)
    return sum(min(1.0, (same - (person == answer)) / 3) for person in people) / len(people)


def textvqa(answers: Answers, ground_truth: Path) -> Score:
    """TextVQA's validation accuracy in percent, of LLaVA's answers, whose question_id is that of the image."""
    source, data = str(ground_truth), read_json(ground_truth)["data"]
    truth = [(entry["image_id"], entry["question"].lower()) for entry in data]
    asked = [(image, _question_of(prompt)) for image, prompt in answers]
    check_unique(asked, "The answers by image and question")
    by_question = dict(zip(asked, answers.values(), strict=True))
    check_unique(truth, source)
    if len(asked) < len(truth):
        raise ValueError(f"{len(asked)} answers were given to {len(truth)} questions of {source}.")
    check_names(truth, by_question, source)
    hits = []
    for (image, question), entry in zip(truth, data, strict=True):
        people = _ten(entry["answers"], f"{question!r} about {image}", ground_truth)
        record = by_question[image, question]
        score = 0.0 if is_blank(record) else agreement(normal(record["text"]), list(map(normal, people)))
        hits.append(Hit(f"{image} {question}", score, image=image))
    return summed(hits, source)


def _ten(people: list[Any], what: str, source: Path) -> list[Any]:
    """`people`; ValueError unless they are ten, as VQA accuracy requires."""
    if not isinstance(people, list) or len(people) != 10:
        raise ValueError(f"{source} has {len(people)} answers to {what} instead of 10. Is the file complete?")
    return people


def _question_of(prompt: str) -> str:
    """The question in LLaVA's prompt for TextVQA, with or without OCR tokens, in lower case."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found[1].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"This is not a prompt of LLaVA for TextVQA: {prompt!r}")


def vqav2(answers: Answers, ground_truth: Path | None = None, questions: Path | None = None) -> Score:
    """VQAv2's accuracy in percent, overall and by type of answer, and its submission; answers as LLaVA submits them.

    As in the official script, people's answers are normalised only if they differ.

    Args:
        ground_truth: None for the test splits, whose answers only the server has.
        questions: of a test split. The server needs all of test; LLaVA answers test-dev, a part of it, and leaves the
            other answers empty.
    """
    if ground_truth is None:
        wanted = [line["question_id"] for line in read_records(questions, lines=True)]
        check_names(wanted, answers, str(questions), complete=False)
        texts = {name: normal(answers[name]["text"]) if name in answers else "" for name in wanted}
        submission = [{"question_id": name, "answer": text} for name, text in texts.items()]
        note = f"{len(answers)} of {len(wanted)} questions are answered; the answers to the others are empty"
        return Score({}, submission=submission, note=note if len(answers) < len(wanted) else None)
    entries, hits = read_json(ground_truth)["annotations"], []
    check_names([entry["question_id"] for entry in entries], answers, str(ground_truth))
    for entry in entries:
        name = entry["question_id"]
        record = answers[name]
        people = [_one_line(person["answer"]) for person in _ten(entry["answers"], f"question {name!r}", ground_truth)]
        given = normal(record["text"])
        if len(set(people)) > 1:
            people = [plain_words(without_punctuation(person)) for person in people]
            given = plain_words(without_punctuation(given))
        score = 0.0 if is_blank(record) else agreement(given, people)
        hits.append(Hit(str(name), score, (entry["answer_type"],), entry.get("image_id", name)))
    found = summed(hits, str(ground_truth))
    found.submission = [{"question_id": name, "answer": normal(record["text"])} for name, record in answers.items()]
    return found


def vizwiz(answers: Answers, ground_truth: Path, questions: Path) -> Score:
    """VizWiz's accuracy in percent where the answers are public (val), and its submission.

    This is the official evaluation of 2024: only the model's answer is normalised, not people's. So if ten people wrote
    "dont know", neither "don't know" nor "dont know" is correct.

    Args:
        questions: LLaVA's llava_*.jsonl, whose question_id the answers have; questions are identified by their image.

    Raises:
        ValueError: an image or id occurs twice, the questions cover other images or only a part, a question has no
            answer, an answer has no question, or not ten people answered.
    """
    entries = read_any_json(ground_truth)
    wanted = read_records(questions, lines=True)
    check_unique([entry["image"] for entry in entries], str(ground_truth))
    check_unique([line["image"] for line in wanted], str(questions))
    truth = {entry["image"]: entry for entry in entries}
    other = [line["image"] for line in wanted if line["image"] not in truth]
    if other:
        raise ValueError(
            f"{ground_truth} has nothing about {len(other)} of the {len(wanted)} images of {questions}, the first: "
            f"{other[0]}. Do both belong to one split?"
        )
    if len(wanted) < len(truth):
        raise ValueError(
            f"{questions} asks about {len(wanted)} of the {len(truth)} images of {ground_truth}. Ask about all."
        )
    check_names([line["question_id"] for line in wanted], answers, str(questions))
    public = any("answers" in entry for entry in entries)
    hits, submission = [], []
    for line in wanted:
        record, entry = answers[line["question_id"]], truth[line["image"]]
        given = normal(record["text"])
        submission.append({"image": line["image"], "answer": given})
        if public:
            people = _ten(entry.get("answers", []), f"the question about {line['image']}", ground_truth)
            score = 0.0 if is_blank(record) else agreement(given, [person["answer"] for person in people])
            hits.append(Hit(line["image"], score, (entry.get("answer_type", "all"),)))
    found = summed(hits, str(ground_truth)) if public else Score({})
    found.submission = submission
    return found
