"""The study of smol-llava: its tasks, on photographs that no training used.

On Flickr8k's dev split (1,000 images) unless noted:
caption    one sentence per image: CIDEr
exists     yes/no questions made like POPE's from the captions of the first 300 images: accuracy
daquar     human questions about 100 of DAQUAR's images that were not used in training: exact answers
retrieval  images by captions, 5 captions each: R@1
coco       the same on 283 images of COCO val2017, zero-shot
sugarcrepe 426 pairs of a true caption and a false one: how often the true one is closer

Each cell also keeps the answers, and figures that are no mean of items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eval import metrics
from llava_fwd2bot.bottleneck import embed
from llava_fwd2bot.evaluation.answers import Answerer
from llava_fwd2bot.evaluation.encode import Encoder
from llava_fwd2bot.evaluation.retrieval import ranks, recalls
from llava_fwd2bot.smol import instructions as make

from .readers import most_tokens, open_method, set_tokens
from .rows import Cell, Key, Rows
from .run import Job
from .smol_items import (
    ANSWERED,
    SEARCHED,
    Selection,
    contents_of,
    images_of_items,
    parts_of,
    questions_of,
    sugarcrepe_items,
)
from .smol_splits import write_training_files

TASKS = (*ANSWERED, *SEARCHED)
WORDS = {"caption": 30, "exists": 8, "daquar": 8}  # tokens of an answer
BATCH = 64
Encode = Callable[[Sequence[Any]], Tensor]  # N images' paths, or texts → [N, k, D]


def prepare(job: Job) -> None:
    """Writes the files of training, below `work`."""
    if not (job.work / "data").exists() and any(row.model is None for row in job.study.rows.values()):
        write_training_files(job.data, job.work / "data")


def contents(job: Job, task: str) -> str:
    return contents_of(task, _selection(job))


def _selection(job: Job) -> Selection:
    return Selection(job.data, job.limit, job.tuning)


def measure(job: Job, rows: Rows, keys: Sequence[Key]) -> None:
    """Measures `keys` of one row.

    Raises:
        ValueError: a k is more than the model makes.
    """
    (model, processor), selection = open_method(job.row.method, job.model), _selection(job)
    most = most_tokens(model)
    too_many = [k for _, _, k, _ in keys if k > most or k < 1 and job.row.method != "base"]
    if too_many:
        raise ValueError(f"{job.model} gives 1 to {most} tokens per image, but k is {too_many[0]}.")
    for task, name, k, seed in keys:
        about = job.about(task)
        rows.add_task(task, images_of_items(task, selection), parts_of(task, selection))
        start, used = time.perf_counter(), set_tokens(model, k)
        made_by = f"{about.get('fingerprint')} {job.row.method}" + f" {k}" * (job.row.method == "pool")
        encoder = Encoder(model, processor, made_by, job.work / "summaries", BATCH)
        if task in ANSWERED:
            items, found = answer(Answerer(encoder, WORDS[task], BATCH), task, used, selection)
        else:
            pooling = model.fwd2bot_config.pooling
            items, found = search(encoder.images, encoder.texts, pooling, task, k, selection)
        about |= {"seconds": round(time.perf_counter() - start, 1), **found}
        rows.add(Cell(task, name, k, seed, items, about))
        print(f"{name} {task} k={k or 'dense'}: {sum(items) / len(items):.4f} ({about['seconds']} s)", flush=True)


def answer(answerer: Answerer, task: str, k: int, selection: Selection) -> tuple[list[float], dict[str, Any]]:
    """The score of each item; all figures of the task and the answers. k = 0 is the base."""
    paths, owner, questions, truth = questions_of(task, selection)
    said = dict(answerer([paths[i] for i in owner], questions, k))
    answers = [said[i] for i in range(len(questions))]
    items, figures = score(task, answers, truth)
    return items, {"figures": figures, "answers": answers}


def score(task: str, said: list[str], truth: list[Any]) -> tuple[list[float], dict[str, Any]]:
    """The score of each item, and all figures of a task."""
    if task == "caption":
        found = metrics.caption_scores(said, truth)
        return found.pop("per_image"), found
    if task == "exists":
        found = metrics.yes_no(said, truth)
        return found.pop("per_item"), found
    items = metrics.exact(said, truth)
    return items, {"exact": sum(items) / len(items)}


def search(
    images: Encode, texts: Encode, pooling: str, task: str, k: int, selection: Selection
) -> tuple[list[float], dict[str, Any]]:
    """Whether each caption is nearer to its image than the other images, or than the false caption, are."""
    if task == "sugarcrepe":
        pairs, _ = sugarcrepe_items(selection)
        paths, captions = [p[0] for p in pairs], [make.tidy(p[i]) for i in (1, 2) for p in pairs]
    else:
        split = selection.flickr() if task == "retrieval" else selection.coco()
        paths, captions = split.paths, [make.tidy(c) for said in split.captions for c in said]
    place = {path: i for i, path in enumerate(dict.fromkeys(paths))}  # several pairs are about one image
    pictures, words = (embed(made[:, :k].float(), pooling) for made in (images(list(place)), texts(captions)))
    if task == "sugarcrepe":
        pictures = pictures[[place[path] for path in paths]]
        right, wrong = ((pictures * side).sum(1) for side in words.split(len(paths)))
        return (right > wrong).double().tolist(), {}
    t2i, i2t = ranks(pictures, words, torch.tensor(images_of_items(task, selection)))
    return (t2i < 1).double().tolist(), {"figures": recalls(t2i, i2t)}
