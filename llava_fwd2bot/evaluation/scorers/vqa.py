"""The VQA accuracy (arXiv 1505.00468) and what it takes for the same answer: TextVQA, VQAv2, VizWiz.

Ten people answered. An answer scores min(1, n/3), n of nine others agreeing, averaged over the ten choices of nine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files.records import read_records
from ...files.text import read_any_json, read_json
from . import Answers, Score, answered, blank, mean, once, strangers, with_groups

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
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")  # the first group is the official script's own, which never holds


def _contractions() -> dict[str, str]:
    """What a word with an apostrophe left out is taken for."""
    found = {word.replace("'", ""): word for word in _ONE.split()}
    for word in _MORE.split():
        for at, letter in enumerate(word):
            if letter == "'":
                found[word[:at] + word[at + 1 :]] = word
    return {**found, "somebody'd": "somebodyd"}  # an oddity of the official table


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """A mark beside a space goes, between letters it becomes a space; all go where a number is written with a comma."""
    out, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", out, count=32)  # so many, because the official script gives a flag in the count's place


def plain_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions with their apostrophes."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normal(answer: str) -> str:
    """An answer as EvalAI's processor gives it, which TextVQA's scorer and LLaVA's submissions use."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(_one_line(answer)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def agreement(answer: str, people: Sequence[str]) -> float:
    """The VQA accuracy of one answer: [0, 1]."""
    same = sum(person == answer for person in people)
    return mean([min(1.0, (same - (person == answer)) / 3) for person in people])


def textvqa(answers: Answers, ground_truth: Path) -> Score:
    """TextVQA's validation accuracy in percent, of LLaVA's answers (question_id is the image's)."""
    data = read_json(ground_truth)["data"]
    once([(entry["image_id"], entry["question"].lower()) for entry in data], str(ground_truth))
    truth = {(entry["image_id"], entry["question"].lower()): entry["answers"] for entry in data}
    asked = [(image, _question_of(prompt)) for image, prompt in answers]
    once(asked, "The answers by image and question")
    per_item, groups = {}, []
    for (image, question), record in zip(asked, answers.values(), strict=True):
        if (image, question) not in truth:
            raise ValueError(f"{ground_truth} has no question {question!r} about {image}.")
        people = _ten(truth[image, question], f"{question!r} about {image}", ground_truth)
        score = 0.0 if blank(record) else agreement(normal(record["text"]), list(map(normal, people)))
        per_item[f"{image} {question}"] = score
        groups.append(image)
    if len(per_item) < len(truth):
        raise ValueError(f"{len(answers)} answers were given to {len(truth)} questions of {ground_truth}.")
    return Score({"accuracy": 100 * mean(list(per_item.values()))}, per_item, groups)


def _ten(people: list[Any], what: str, source: Path) -> list[Any]:
    """`people`; ValueError where they are not ten, over whom the accuracy is defined."""
    if not isinstance(people, list) or len(people) != 10:
        raise ValueError(f"{source} has {len(people)} answers to {what}, where 10 belong. Is the file whole?")
    return people


def _question_of(prompt: str) -> str:
    """The question in LLaVA's prompt for TextVQA, with OCR tokens or without, in lower case."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found[1].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"This is no prompt of LLaVA's for TextVQA: {prompt!r}")


def vqav2(answers: Answers, ground_truth: Path | None = None, questions: Path | None = None) -> Score:
    """VQAv2's accuracy in percent, of answers as LLaVA submits them; by type of answer as well; and its submission.

    As the official script, people's answers are made alike only where they differ.

    Args:
        ground_truth: None for the test splits, whose answers its server alone has.
        questions: of a test split: the server takes it whole. LLaVA answers test-dev, a part of test, and leaves the
            other answers empty.
    """
    if ground_truth is None:
        asked = [line["question_id"] for line in read_records(questions, lines=True)]
        once(asked, str(questions))
        strangers(answers, set(asked), str(questions))
        texts = {name: normal(answers[name]["text"]) if name in answers else "" for name in asked}
        submission = [{"question_id": name, "answer": text} for name, text in texts.items()]
        told = f"{len(answers)} of {len(asked)} questions are answered; the answers to the others are empty"
        return Score({}, submission=submission, note=told if len(answers) < len(asked) else None)
    submission = [{"question_id": name, "answer": normal(record["text"])} for name, record in answers.items()]
    entries = read_json(ground_truth)["annotations"]
    names = [entry["question_id"] for entry in entries]
    once(names, str(ground_truth))
    strangers(answers, set(names), str(ground_truth))
    per_item, by_type = {}, {}
    for name, entry in zip(names, entries, strict=True):
        record = answered(name, answers, str(ground_truth))
        people = [_one_line(person["answer"]) for person in _ten(entry["answers"], f"question {name!r}", ground_truth)]
        said = normal(record["text"])
        if len(set(people)) > 1:
            people = [plain_words(without_punctuation(person)) for person in people]
            said = plain_words(without_punctuation(said))
        score = 0.0 if blank(record) else agreement(said, people)
        per_item[str(name)] = score
        by_type.setdefault(entry["answer_type"], []).append(score)
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    groups = [entry.get("image_id", name) for name, entry in zip(names, entries, strict=True)]
    figures = with_groups(figures, [dict(sorted(by_type.items()))], str(ground_truth))
    return Score(figures, per_item, groups, submission)


def vizwiz(answers: Answers, ground_truth: Path, questions: Path) -> Score:
    """VizWiz's accuracy in percent where the answers are public (val), and its submission.

    It is the official evaluation of 2024: people's answers are taken as they stand, the model's alone is made plain. So
    where ten people wrote "dont know", neither "don't know" nor "dont know" is right.

    Args:
        questions: LLaVA's llava_*.jsonl, whose question_id the answers have; images tell the questions apart.

    Raises:
        ValueError: an image or id is there twice, the questions are about a part of the images or others, a question
            has no answer, an answer has no question, or the people who answered are not ten.
    """
    entries = read_any_json(ground_truth)
    asked = read_records(questions, lines=True)
    once([entry["image"] for entry in entries], str(ground_truth))
    for field in ("image", "question_id"):
        once([line[field] for line in asked], str(questions))
    truth = {entry["image"]: entry for entry in entries}
    other = [line["image"] for line in asked if line["image"] not in truth]
    if other:
        raise ValueError(
            f"{ground_truth} has nothing about {len(other)} of the {len(asked)} images of {questions}, the first: "
            f"{other[0]}. Are both of one split?"
        )
    if len(asked) < len(truth):
        raise ValueError(
            f"{questions} asks about {len(asked)} of the {len(truth)} images of {ground_truth}, a part. Ask about all."
        )
    strangers(answers, {line["question_id"] for line in asked}, str(questions))
    public = any("answers" in entry for entry in entries)
    per_item, by_type, submission = {}, {}, []
    for line in asked:
        record = answered(line["question_id"], answers, str(questions))
        said = normal(record["text"])
        submission.append({"image": line["image"], "answer": said})
        if not public:
            continue
        entry = truth[line["image"]]
        people = _ten(entry.get("answers", []), f"the question about {line['image']}", ground_truth)
        score = 0.0 if blank(record) else agreement(said, [person["answer"] for person in people])
        per_item[line["image"]] = score
        by_type.setdefault(entry.get("answer_type", "all"), []).append(score)
    if not per_item:
        return Score({}, submission=submission)
    figures = {"accuracy": 100 * mean(list(per_item.values()))}
    figures = with_groups(figures, [dict(sorted(by_type.items()))], str(ground_truth))
    return Score(figures, per_item, submission=submission)
