"""The items of each task on smol-llava: images, questions, captions, and what is right."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fwd2bot.evaluation.datasets import Captioned, read_captioned
from llava_fwd2bot.files.regular import file_digest
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.smol import instructions as make

from . import smol_splits

ANSWERED = ("caption", "exists", "daquar")
SEARCHED = ("retrieval", "coco", "sugarcrepe")


@dataclass(frozen=True)
class Selection:
    """The items to use: the reported split, its first `limit`, or those held out for choosing settings.

    Attributes:
        pairs: at most about so many of SugarCrepe's, evenly over its kinds.
    """

    data: Path
    limit: int | None = None
    tuning: bool = False
    pairs: int | None = None

    def flickr(self) -> Captioned:
        folder = self.data / "flickr8k"
        if not self.tuning:
            return read_captioned(str(folder / "dev.jsonl")).first(self.limit)
        held_out = smol_splits.flickr(self.data)[0][: self.limit]
        return Captioned(
            "tuning", [folder / "images" / e["image"] for e in held_out], [e["captions"] for e in held_out]
        )

    def coco(self) -> Captioned:
        return read_captioned(str(self.data / "coco_val2017" / "captions.jsonl")).first(self.limit)

    def daquar(self) -> list[dict[str, Any]]:
        return smol_splits.daquar(self.data)[self.tuning][: self.limit]


def questions_of(task: str, selection: Selection) -> tuple[list[Path], list[int], list[str], list[Any]]:
    """(images, image index of each question, questions, right answers)."""
    if task == "daquar":
        asked = selection.daquar()
        names = sorted({q["image"] for q in asked})
        paths = [selection.data / "daquar" / "images" / name for name in names]
        truth = [make.spoken(q["answer"]) for q in asked]
        return paths, [names.index(q["image"]) for q in asked], [q["question"] for q in asked], truth
    dev = selection.flickr()
    if task == "caption":
        count = len(dev.paths)
        return dev.paths, list(range(count)), [make.DESCRIBE] * count, dev.captions
    entries = [{"image": i, "captions": captions} for i, captions in enumerate(dev.captions[:300])]
    asked = [q for kind in ("random", "popular", "adversarial") for q in make.pope_questions(entries, kind, 1)]
    return dev.paths, [q["image"] for q in asked], [q["question"] for q in asked], [q["answer"] for q in asked]


def sugarcrepe_items(selection: Selection) -> tuple[list[tuple[Path, str, str]], list[str]]:
    """(image, true caption, false caption) of each pair with an available image, and its kind."""
    paths = {path.name: path for path in selection.coco().paths}
    rows, kinds = [], []
    for file in sorted((selection.data / "bench" / "sugarcrepe").glob("*.json")):
        for item in read_json(file).values():
            name = item["filename"].rsplit("_", 1)[-1]
            if name in paths:
                rows.append((paths[name], item["caption"], item["negative_caption"]))
                kinds.append(file.stem)
    step = 1 if selection.pairs is None else max(1, len(rows) // selection.pairs)
    return rows[::step], kinds[::step]


def images_of_items(task: str, selection: Selection) -> list[Any]:
    """The image of each item of a task, in order; items of an image are resampled together."""
    if task in ANSWERED:
        return questions_of(task, selection)[1]
    if task == "sugarcrepe":
        return [path.name for path, *_ in sugarcrepe_items(selection)[0]]
    split = selection.flickr() if task == "retrieval" else selection.coco()
    return [i for i, said in enumerate(split.captions) for _ in said]


def parts_of(task: str, selection: Selection) -> dict[str, list[int]]:
    """The numbers of the items of each kind of SugarCrepe; the other tasks have no parts."""
    kinds = sugarcrepe_items(selection)[1] if task == "sugarcrepe" else []
    return {kind: [i for i, own in enumerate(kinds) if own == kind] for kind in sorted(set(kinds))}


def contents_of(task: str, selection: Selection) -> str:
    """A digest of a task's images, questions and right answers, whatever the files are called."""
    if task in ANSWERED:
        paths, *texts = questions_of(task, selection)
    elif task == "sugarcrepe":
        rows, kinds = sugarcrepe_items(selection)
        paths, texts = [path for path, *_ in rows], [[row[1:] for row in rows], kinds]
    else:
        split = selection.flickr() if task == "retrieval" else selection.coco()
        paths, texts = split.paths, [split.captions]
    images = {path: file_digest(path) for path in dict.fromkeys(paths)}
    return hashlib.sha256(json.dumps([[images[path] for path in paths], *texts]).encode()).hexdigest()[:16]
