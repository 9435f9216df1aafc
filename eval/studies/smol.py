"""The whole table on smol-llava: base against Fwd2Bot and the rivals, at every k, on photographs it was not trained on.

    python -m eval.studies.smol --data DATA --work DIR --run base=BASE --run fwd2bot=CHECKPOINT [--run pool=… ]

Each `--run METHOD=PATH` is answered task by task; a task that is done is not done again, so a stopped run goes on. The
files in DIR (one per method, task and k) hold every answer. `--output` writes the table as JSON and Markdown, and a
picture. METHOD is one of readers.py's; `fwd2bot-short` and the like name a second run of a method.

Tasks, on Flickr8k's dev split (1,000 images) where nothing else is said:
caption    one sentence per image: CIDEr, BLEU-4
exists     yes/no questions made POPE's way from the captions of the first 300 images: accuracy, F1
daquar     human questions about 100 of DAQUAR's images that no training saw: exact answers, WUPS at 0.9
retrieval  both ways between images and their 5 captions: R@1, 5, 10
coco       the same on 283 images of COCO val2017, zero-shot
sugarcrepe 426 pairs of a true caption and a false one: how often the true one is nearer
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava_fwd2bot.cache.summary_file import fingerprint_of
from llava_fwd2bot.checkpoint.load import base_source
from llava_fwd2bot.evaluation import metrics
from llava_fwd2bot.evaluation.answers import DENSE
from llava_fwd2bot.evaluation.search import ranks, recalls
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.regular import file_digest
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_text
from llava_fwd2bot.hosts.opening import is_checkpoint, local_folder
from llava_fwd2bot.smol import instructions as make

from . import smol_splits
from .readers import BaseReader, Images, SummaryReader, open_reader

ANSWERED = ("caption", "exists", "daquar")
SEARCHED = ("retrieval", "coco", "sugarcrepe")


@dataclass
class Split:
    """Images of one data set, and what is asked or said of them."""

    paths: list[Path]
    captions: list[list[str]]

    @classmethod
    def of(cls, entries: list[dict[str, Any]], images: Path) -> Split:
        return cls([images / e["image"] for e in entries], [e["captions"] for e in entries])


@dataclass(frozen=True)
class Asked:
    """Which items: all of the reported split, the first `limit`, or those that settings are chosen by."""

    data: Path
    limit: int | None = None
    tuning: bool = False

    def flickr(self) -> Split:
        folder = self.data / "flickr8k"
        entries = smol_splits.flickr(self.data)[0] if self.tuning else read_records(folder / "dev.jsonl")
        return Split.of(entries[: self.limit], folder / "images")

    def coco(self) -> Split:
        folder = self.data / "coco_val2017"
        return Split.of(read_records(folder / "captions.jsonl")[: self.limit], folder / "images")

    def daquar(self) -> list[dict[str, Any]]:
        return smol_splits.daquar(self.data)[self.tuning][: self.limit]


def questions_of(task: str, asked_of: Asked) -> tuple[list[Path], list[int], list[str], list[Any]]:
    """Images, the image of each question, the questions, and what is right."""
    if task == "daquar":
        asked = asked_of.daquar()
        names = sorted({q["image"] for q in asked})
        paths = [asked_of.data / "daquar" / "images" / name for name in names]
        truth = [make.spoken(q["answer"]) for q in asked]
        return paths, [names.index(q["image"]) for q in asked], [q["question"] for q in asked], truth
    dev = asked_of.flickr()
    if task == "caption":
        count = len(dev.paths)
        return dev.paths, list(range(count)), [make.DESCRIBE] * count, dev.captions
    entries = [{"image": i, "captions": captions} for i, captions in enumerate(dev.captions[:300])]
    asked = [q for kind in ("random", "popular", "adversarial") for q in make.pope_questions(entries, kind, 1)]
    return dev.paths, [q["image"] for q in asked], [q["question"] for q in asked], [q["answer"] for q in asked]


def answer(reader: BaseReader, images: Images, task: str, k: int, asked_of: Asked) -> dict[str, Any]:
    paths, owner, questions, truth = questions_of(task, asked_of)
    used = sorted(set(owner))
    state, place = images([paths[i] for i in used]), {i: n for n, i in enumerate(used)}
    with tqdm(total=len(questions), desc=f"{task} k={k or 'dense'}", unit="question") as bar:
        words = 30 if task == "caption" else 8
        said = reader.answer(state, [place[i] for i in owner], questions, k, words, advance=bar.update)
    return {"said": said, **score(task, said, truth)}


def score(task: str, said: list[str], truth: list[Any]) -> dict[str, Any]:
    """The figures of a task; `items` is what the headline figure is the mean of."""
    if task == "caption":
        found = metrics.caption_scores(said, truth)
        items = found.pop("per_image")
        return {"figures": found, "items": items}
    if task == "exists":
        found = metrics.yes_no(said, truth)
        items = found.pop("per_item")
        return {"figures": found, "items": items}
    items, soft = metrics.exact(said, truth), metrics.wups(said, truth)
    wups = None if soft is None else sum(soft) / len(soft)
    return {"figures": {"exact": sum(items) / len(items), "wups": wups}, "items": items}


def search(
    reader: SummaryReader, images: Images, texts: dict[str, Tensor], task: str, k: int, asked_of: Asked
) -> dict[str, Any]:
    if task == "sugarcrepe":
        return sugarcrepe(reader, images, texts, k, asked_of)
    split = asked_of.flickr() if task == "retrieval" else asked_of.coco()
    captions = [make.tidy(c) for said in split.captions for c in said]
    owner = torch.tensor([i for i, said in enumerate(split.captions) for _ in said])
    if task not in texts:
        texts[task] = reader.text_states(captions)
    t2i, i2t = ranks(reader.embed_images(images(split.paths), k), reader.embed_images(texts[task], k), owner)
    return {"figures": recalls(t2i, i2t), "items": (t2i < 1).double().tolist()}


def sugarcrepe_items(asked_of: Asked) -> tuple[list[tuple[Path, str, str]], list[str]]:
    """(image, true caption, false caption) of each pair whose image is there, and its kind."""
    paths = {path.name: path for path in asked_of.coco().paths}
    rows, kinds = [], []
    for file in sorted((asked_of.data / "bench" / "sugarcrepe").glob("*.json")):
        for item in read_json(file).values():
            name = item["filename"].rsplit("_", 1)[-1]
            if name in paths:
                rows.append((paths[name], item["caption"], item["negative_caption"]))
                kinds.append(file.stem)
    return rows, kinds


def sugarcrepe(
    reader: SummaryReader, images: Images, texts: dict[str, Tensor], k: int, asked_of: Asked
) -> dict[str, Any]:
    rows, kinds = sugarcrepe_items(asked_of)
    if "sugarcrepe" not in texts:
        texts["sugarcrepe"] = reader.text_states([make.tidy(r[i]) for i in (1, 2) for r in rows])
    vectors = reader.embed_images(texts["sugarcrepe"], k)
    pictures = reader.embed_images(images([r[0] for r in rows]), k)
    right, wrong = (pictures * vectors[: len(rows)]).sum(1), (pictures * vectors[len(rows) :]).sum(1)
    items = (right > wrong).double().tolist()
    figures = {"accuracy": sum(items) / len(items)}
    for kind in sorted(set(kinds)):
        hits = [x for x, own in zip(items, kinds, strict=True) if own == kind]
        figures[f"{kind} ({len(hits)})"] = sum(hits) / len(hits)
    return {"figures": figures, "items": items}


def images_of_items(task: str, asked_of: Asked) -> list[Any]:
    """The image of each item of a task, in order: what is drawn together for an interval."""
    if task in ANSWERED:
        return questions_of(task, asked_of)[1]
    if task == "sugarcrepe":
        return [path.name for path, *_ in sugarcrepe_items(asked_of)[0]]
    split = asked_of.flickr() if task == "retrieval" else asked_of.coco()
    return [i for i, said in enumerate(split.captions) for _ in said]


def contents_of(task: str, asked_of: Asked) -> str:
    """A digest of a task's images, questions and right answers: a result is of these, whatever their names."""
    if task in ANSWERED:
        paths, *told = questions_of(task, asked_of)
    elif task == "sugarcrepe":
        rows, kinds = sugarcrepe_items(asked_of)
        paths, told = [path for path, *_ in rows], [[row[1:] for row in rows], kinds]
    else:
        split = asked_of.flickr() if task == "retrieval" else asked_of.coco()
        paths, told = split.paths, [split.captions]
    images = {path: file_digest(path) for path in dict.fromkeys(paths)}
    return hashlib.sha256(json.dumps([[images[path] for path in paths], *told]).encode()).hexdigest()[:16]


def weights_of(base: str) -> str | None:
    """A digest of a base's weights; None for one that is named by the hub."""
    files = sorted(Path(base_source(base)).glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()[:16] if files else None


def run(method: str, path: str, tasks: Sequence[str], ks: Sequence[int], asked_of: Asked, work: Path) -> None:
    """Does what is not done yet of one method, and writes a file for each task and k."""
    kind = method.split("-")[0]
    ks = [DENSE] if kind == "base" else [1] if kind in ("mean", "last") else list(ks)
    able = (
        ANSWERED
        if kind in ("base", "prune", "pool", "query", "kv")
        else SEARCHED
        if kind in ("mean", "last")
        else tasks
    )
    jobs = [(task, k) for task in tasks if task in able for k in ks]
    about = {"method": method, "path": path, "limit": asked_of.limit, "tuning": asked_of.tuning}
    if kind not in ("base", "prune") and is_checkpoint(folder := local_folder(path, {})):
        about["fingerprint"] = fingerprint_of(folder)  # one that is trained anew may keep its path
    else:
        about["weights"] = weights_of(path)
    contents = cache(lambda task: contents_of(task, asked_of))
    jobs = [(task, k) for task, k in jobs if not is_done(result_file(work, method, task, k), about, contents)]
    if not jobs:
        return
    reader = open_reader(method, path)
    config = getattr(reader.model, "fwd2bot_config", None)
    most = reader.model.config.image_seq_length if config is None else config.num_summary_tokens
    beyond = [k for _, k in jobs if k > most or k < 1 and kind != "base"]
    if beyond:
        raise ValueError(f"{path} gives from 1 to {most} tokens of an image, but --k asks for {beyond[0]}.")
    images, texts = Images(reader), {}
    for task, k in jobs:
        start = time.perf_counter()
        if task in ANSWERED:
            found = answer(reader, images, task, k, asked_of)
        else:
            found = search(reader, images, texts, task, k, asked_of)
        seconds = round(time.perf_counter() - start, 1)
        found["items"] = [round(x, 5) if x % 1 else int(x) for x in found["items"]]
        # on one line: there are many such files, and they are kept
        own = {"task": task, "k": k, "seconds": seconds, **about, "data": contents(task)}
        result = json.dumps({**own, **found}, ensure_ascii=False)
        write_text(result_file(work, method, task, k), result + "\n")
        print(f"{method} {task} k={k or 'dense'}: {found['figures']} ({seconds} s)", flush=True)


def is_done(file: Path, about: dict[str, Any], contents: Callable[[str], str]) -> bool:
    """Whether `file` holds this result.

    Args:
        contents: gives the digest of a task's items.

    Raises:
        ValueError: it holds another model's, or that of other items.
    """
    if not file.exists():
        return False
    found = read_json(file)

    def other(about: dict[str, Any]) -> list[str]:
        pairs = ((name, found.get(name, value), value) for name, value in about.items())
        return [f"{name} {own!r}, not {value!r}" for name, own, value in pairs if own != value]

    # the settings first: to digest the items all images are read
    if wrong := other(about) or ("data" in found and other({"data": contents(found["task"])})):
        raise ValueError(f"{file} is a result of {'; '.join(wrong)}: give another --work, or delete it")
    return True


def result_file(work: Path, method: str, task: str, k: int) -> Path:
    return work / f"{method}.{task}.k{k}.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder with flickr8k, daquar, coco_val2017, bench"
    )
    parser.add_argument("--work", type=Path, required=True, help="where the answers go, and are looked for")
    parser.add_argument("--run", action="append", default=[], metavar="METHOD=PATH", help="may be given several times")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tasks", nargs="+", default=[*ANSWERED, *SEARCHED], choices=[*ANSWERED, *SEARCHED])
    parser.add_argument("--limit", type=int, help="the first so many images or questions of each task; for a try")
    parser.add_argument("--tuning", action="store_true", help="the items kept out of training to choose settings by")
    parser.add_argument(
        "--output", type=Path, help="NAME: writes NAME.json, NAME.md and NAME.png of all that DIR holds"
    )
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    asked_of = Asked(arguments.data, arguments.limit, arguments.tuning)
    for entry in arguments.run:
        method, _, path = entry.partition("=")
        if not path:
            parser.error(f"--run takes METHOD=PATH, got {entry!r}")
        run(method, path, arguments.tasks, arguments.k, asked_of, arguments.work)
    if arguments.output:
        from .smol_report import report

        report(arguments.work, arguments.output, lambda task: images_of_items(task, asked_of))
    return 0


if __name__ == "__main__":
    sys.exit(main())
