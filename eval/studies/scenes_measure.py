"""Measures a reader on scenes: answers by kind and number of objects, retrieval, hard negatives.

The same code for the base, Fwd2Bot and the other methods. Every measure has one number per item; `images` caches the
encoded pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.metrics import exact
from llava_fwd2bot.evaluation.retrieval import ranks
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.text import read_json

from .readers import BaseReader, Images, SummaryReader
from .scenes import KINDS

DESCRIBE = "describe"  # not scored as an answer; captions cover the whole scene
WORDS = 4  # tokens of the longest short answer, with its end token


def answers(reader: BaseReader, images: Images, folder: Path, split: str, ks: Sequence[int]) -> dict[str, Any]:
    """Whether each question is answered correctly: {"kinds": […], "objects": […], "images": [index, …], "k": {k:
    [1.0 or 0.0, …]}}."""
    asked = [q for q in read_records(folder / f"{split}.questions.jsonl", lines=True) if q["kind"] != DESCRIBE]
    names = list(dict.fromkeys(q["image"] for q in asked))
    place = {name: i for i, name in enumerate(names)}
    state = images([folder / "images" / name for name in names])
    owner = [place[q["image"]] for q in asked]
    found: dict[str, Any] = {"kinds": [q["kind"] for q in asked], "objects": [q["objects"] for q in asked]}
    found |= {"images": owner, "k": {}}
    for k in ks:
        said = reader.answer(state, owner, [q["text"] for q in asked], k, WORDS)
        found["k"][str(k)] = exact(said, [q["answer"] for q in asked])
    return found


def searched(reader: SummaryReader, images: Images, folder: Path, split: str, ks: Sequence[int]) -> dict[str, Any]:
    """Retrieval by long captions, which fit only one picture, and hard negatives by embedding.

    Returns:
        {"t2i": {k: [1.0 where the right picture comes first, …]}, "t2i_hard": the same with each picture's
        hard negative among the pictures, "hard": {k: {kind: […]}}, "hard_images": {kind: […: which picture]}}
    """
    said = read_records(folder / f"{split}.captions.jsonl", lines=True)
    long = [entry["captions"][-1] for entry in said]
    state = images([folder / "images" / entry["image"] for entry in said])
    place = {entry["image"]: i for i, entry in enumerate(said)}
    altered = images([folder / "images" / entry["altered"] for entry in said])
    texts = reader.text_states(long)
    tests = {kind: list(read_json(folder / f"{split}.sugarcrepe" / f"{kind}.json").values()) for kind in KINDS}
    short = list(
        dict.fromkeys(t[name] for own in tests.values() for t in own for name in ("caption", "negative_caption"))
    )
    column = {text: i for i, text in enumerate(short)}
    words = reader.text_states(short)
    result: dict[str, Any] = {"t2i": {}, "t2i_hard": {}, "hard": {}}
    result["hard_images"] = {kind: [place[t["filename"]] for t in own] for kind, own in tests.items()}
    for k in ks:
        left = reader.embed_images(state, k).float()
        captions = reader.embed_images(texts, k).float()
        both = torch.cat([left, reader.embed_images(altered, k).float()])
        for name, gallery in (("t2i", left), ("t2i_hard", both)):
            t2i, _ = ranks(gallery, captions, torch.arange(len(said)))  # a hard negative has no caption of its own
            result[name][str(k)] = (t2i < 1).float().tolist()
        right = reader.embed_images(words, k).float()
        result["hard"][str(k)] = {
            kind: [
                float(
                    left[place[t["filename"]]] @ (right[column[t["caption"]]] - right[column[t["negative_caption"]]])
                    > 0
                )
                for t in own
            ]
            for kind, own in tests.items()
        }
    return result


def attention(reader: BaseReader, images: Images, folder: Path, split: str, k: int, count: int = 200) -> list[float]:
    """Attention of a question's last token per visual token, for `count` questions (figure 4 of the paper)."""
    asked = [q for q in read_records(folder / f"{split}.questions.jsonl", lines=True) if q["kind"] == "attribute"]
    state = images([folder / "images" / q["image"] for q in asked[:count]])
    return reader.attention_per_token(state, k, [q["text"] for q in asked[:count]]).tolist()
