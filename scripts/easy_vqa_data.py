"""easy-VQA (PyPI `easy-vqa`, MIT), pictures of one shape and questions, in LLaVA's format; and a processor for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tiny_llava
from easy_vqa import get_test_image_paths, get_test_questions, get_train_image_paths, get_train_questions
from transformers import LlavaProcessor

SIZE, PATCH = 64, 8
TURNS = 3
SHAPES = ["circle", "rectangle", "triangle"]
COLORS = ["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"]

Question = tuple[int, str, str]  # image, question, answer


def load(split: str) -> tuple[dict[int, Path], list[Question]]:
    """Paths of the pictures of a split by number, and its questions."""
    train = split == "train"
    paths = get_train_image_paths() if train else get_test_image_paths()
    questions, answers, images = get_train_questions() if train else get_test_questions()
    return {n: Path(paths[n]) for n in sorted(paths)}, list(zip(images, questions, answers, strict=True))


def attributes(questions: list[Question]) -> dict[int, dict[str, str]]:
    """Shape and colour of each picture, as far as its own questions and answers tell them."""
    found: dict[int, dict[str, str]] = {}
    for image, question, answer in questions:
        words = question.rstrip("?").split()
        negated = "not" in words or "no" in words
        if answer in ("yes", "no") and (answer == "yes") == negated:
            continue  # "is there a circle? no" tells only what it is not
        for word in [answer, *words]:
            for kind, names in (("shape", SHAPES), ("color", COLORS)):
                if word in names:
                    found.setdefault(image, {})[kind] = word
    return found


def captions(questions: list[Question]) -> dict[int, str]:
    """ "a blue circle", put together from the answers, for the pictures whose answers tell both."""
    known = attributes(questions)
    return {n: f"a {k['color']} {k['shape']}" for n, k in known.items() if len(k) == 2}


def write_llava_json(paths: dict[int, Path], questions: list[Question], output: Path) -> None:
    """LLaVA's conversations: a picture's questions, in any order, as turns of a few records; its caption.

    Few turns each: the answers of long conversations can be told from earlier turns, without the picture.
    """
    asked: dict[int, list[tuple[str, str]]] = {}
    for image, question, answer in questions:
        asked.setdefault(image, []).append((question, answer))
    caption, rng = captions(questions), random.Random(0)
    records = []
    for image, file in paths.items():
        rng.shuffle(asked[image])
        for start in range(0, len(asked[image]), TURNS):
            turns = []
            for question, answer in asked[image][start : start + TURNS]:
                turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
                turns.append({"from": "gpt", "value": answer})
            record = {"id": f"{image}-{start}", "image": file.name, "conversations": turns}
            records.append(record | ({"caption": caption[image]} if image in caption else {}))
    output.write_text(json.dumps(records), encoding="utf-8")


def build_processor() -> LlavaProcessor:
    """A word-level tokenizer over the training questions and the prompts; 64 × 64 pixels in patches of 8, so n = 64."""
    texts = {text for q in load("train")[1] for text in q[1:]}
    # the pictures are mostly white; measured better than CLIP's own numbers
    return tiny_llava.build_processor(texts, SIZE, PATCH, mean=0.75, std=0.25)
