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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval import metrics
from llava_fwd2bot.evaluation.retrieval import ranks, recalls
from llava_fwd2bot.smol import instructions as make

from .readers import BaseReader, Images, SummaryReader, open_reader
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
    reader, selection = open_reader(job.row.method, job.model), _selection(job)
    config = getattr(reader.model, "fwd2bot_config", None)
    most = reader.model.config.image_seq_length if config is None else config.num_summary_tokens
    too_many = [k for _, _, k, _ in keys if k > most or k < 1 and job.row.method != "base"]
    if too_many:
        raise ValueError(f"{job.model} gives 1 to {most} tokens per image, but k is {too_many[0]}.")
    images, texts = Images(reader), {}
    for task, name, k, seed in keys:
        rows.add_task(task, images_of_items(task, selection), parts_of(task, selection))
        start = time.perf_counter()
        if task in ANSWERED:
            items, found = answer(reader, images, task, k, selection)
        else:
            items, found = search(reader, images, texts, task, k, selection)
        about = {**job.about(task), "seconds": round(time.perf_counter() - start, 1), **found}
        rows.add(Cell(task, name, k, seed, items, about))
        print(f"{name} {task} k={k or 'dense'}: {sum(items) / len(items):.4f} ({about['seconds']} s)", flush=True)


def answer(
    reader: BaseReader, images: Images, task: str, k: int, selection: Selection
) -> tuple[list[float], dict[str, Any]]:
    paths, owner, questions, truth = questions_of(task, selection)
    used = sorted(set(owner))
    state, place = images([paths[i] for i in used]), {i: n for n, i in enumerate(used)}
    with tqdm(total=len(questions), desc=f"{task} k={k or 'dense'}", unit="question") as bar:
        words = 30 if task == "caption" else 8
        said = reader.answer(state, [place[i] for i in owner], questions, k, words, advance=bar.update)
    items, figures = score(task, said, truth)
    return items, {"figures": figures, "answers": said}


def score(task: str, said: list[str], truth: list[Any]) -> tuple[list[float], dict[str, Any]]:
    """The score of each item, and all figures of a task."""
    if task == "caption":
        found = metrics.caption_scores(said, truth)
        return found.pop("per_image"), found
    if task == "exists":
        found = metrics.yes_no(said, truth)
        return found.pop("per_item"), found
    items, soft = metrics.exact(said, truth), metrics.wups(said, truth)
    return items, {"exact": sum(items) / len(items), "wups": None if soft is None else sum(soft) / len(soft)}


def search(
    reader: SummaryReader, images: Images, texts: dict[str, Tensor], task: str, k: int, selection: Selection
) -> tuple[list[float], dict[str, Any]]:
    if task == "sugarcrepe":
        pairs, _ = sugarcrepe_items(selection)
        paths, captions = [p[0] for p in pairs], [make.tidy(p[i]) for i in (1, 2) for p in pairs]
    else:
        split = selection.flickr() if task == "retrieval" else selection.coco()
        paths, captions = split.paths, [make.tidy(c) for said in split.captions for c in said]
    if task not in texts:
        texts[task] = reader.text_states(captions)
    pictures, words = reader.embed_images(images(paths), k), reader.embed_images(texts[task], k)
    if task == "sugarcrepe":
        right, wrong = ((pictures * side).sum(1) for side in words.split(len(paths)))
        return (right > wrong).double().tolist(), {}
    t2i, i2t = ranks(pictures, words, torch.tensor(images_of_items(task, selection)))
    return (t2i < 1).double().tolist(), {"figures": recalls(t2i, i2t)}
