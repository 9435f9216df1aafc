"""The table on smol-llava: the base, Fwd2Bot and other methods at every k, on photographs not used in training.

    python -m eval.studies.smol --data DATA --work DIR --run base=BASE --run fwd2bot=CHECKPOINT [--run pool=… ]

Each `--run METHOD=PATH` is evaluated task by task. Finished tasks are skipped, so a stopped run resumes. The files in
DIR (one per method, task and k) hold every answer. `--output` writes the table as JSON and Markdown, and a picture.
METHOD is one of readers.py; a suffix, as in `fwd2bot-short`, names another run of a method.

Tasks, on Flickr8k's dev split (1,000 images) unless noted:
caption    one sentence per image: CIDEr, BLEU-4
exists     yes/no questions made like POPE's from the captions of the first 300 images: accuracy, F1
daquar     human questions about 100 of DAQUAR's images that were not used in training: exact answers, WUPS at 0.9
retrieval  images by captions and captions by images, 5 captions each: R@1, 5, 10
coco       the same on 283 images of COCO val2017, zero-shot
sugarcrepe 426 pairs of a true caption and a false one: how often the true one is closer
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval import metrics
from llava_fwd2bot.cache.summary_file import fingerprint_of
from llava_fwd2bot.checkpoint.load import base_source
from llava_fwd2bot.evaluation.answers import DENSE
from llava_fwd2bot.evaluation.retrieval import ranks, recalls
from llava_fwd2bot.files.regular import file_digest
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_text
from llava_fwd2bot.hosts.opening import is_checkpoint, local_folder
from llava_fwd2bot.smol import instructions as make

from .readers import BaseReader, Images, SummaryReader, open_reader
from .smol_items import ANSWERED, SEARCHED, Selection, contents_of, images_of_items, questions_of, sugarcrepe_items


def answer(reader: BaseReader, images: Images, task: str, k: int, selection: Selection) -> dict[str, Any]:
    paths, owner, questions, truth = questions_of(task, selection)
    used = sorted(set(owner))
    state, place = images([paths[i] for i in used]), {i: n for n, i in enumerate(used)}
    with tqdm(total=len(questions), desc=f"{task} k={k or 'dense'}", unit="question") as bar:
        words = 30 if task == "caption" else 8
        said = reader.answer(state, [place[i] for i in owner], questions, k, words, advance=bar.update)
    return {"said": said, **score(task, said, truth)}


def score(task: str, said: list[str], truth: list[Any]) -> dict[str, Any]:
    """The scores of a task; `items` are those whose mean is the main score."""
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
    reader: SummaryReader, images: Images, texts: dict[str, Tensor], task: str, k: int, selection: Selection
) -> dict[str, Any]:
    if task == "sugarcrepe":
        return sugarcrepe(reader, images, texts, k, selection)
    split = selection.flickr() if task == "retrieval" else selection.coco()
    captions = [make.tidy(c) for said in split.captions for c in said]
    owner = torch.tensor([i for i, said in enumerate(split.captions) for _ in said])
    if task not in texts:
        texts[task] = reader.text_states(captions)
    t2i, i2t = ranks(reader.embed_images(images(split.paths), k), reader.embed_images(texts[task], k), owner)
    return {"figures": recalls(t2i, i2t), "items": (t2i < 1).double().tolist()}


def sugarcrepe(
    reader: SummaryReader, images: Images, texts: dict[str, Tensor], k: int, selection: Selection
) -> dict[str, Any]:
    rows, kinds = sugarcrepe_items(selection)
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


def weights_of(base: str) -> str | None:
    """A digest of a base's weights; None for a hub name."""
    files = sorted(Path(base_source(base)).glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()[:16] if files else None


def run(method: str, path: str, tasks: Sequence[str], ks: Sequence[int], selection: Selection, work: Path) -> None:
    """Runs the unfinished tasks of one method, and writes a file per task and k."""
    kind = method.split("-")[0]
    ks = [DENSE] if kind == "base" else [1] if kind in ("mean", "last") else list(ks)
    tasks_of_method = (
        ANSWERED
        if kind in ("base", "prune", "pool", "query", "kv")
        else SEARCHED
        if kind in ("mean", "last")
        else tasks
    )
    jobs = [(task, k) for task in tasks if task in tasks_of_method for k in ks]
    about = {"method": method, "path": path, "limit": selection.limit, "tuning": selection.tuning}
    if kind not in ("base", "prune") and is_checkpoint(folder := local_folder(path, {})):
        about["fingerprint"] = fingerprint_of(folder)  # a retrained checkpoint may keep its path
    else:
        about["weights"] = weights_of(path)
    contents = cache(lambda task: contents_of(task, selection))
    jobs = [(task, k) for task, k in jobs if not is_done(result_file(work, method, task, k), about, contents)]
    if not jobs:
        return
    reader = open_reader(method, path)
    config = getattr(reader.model, "fwd2bot_config", None)
    most = reader.model.config.image_seq_length if config is None else config.num_summary_tokens
    too_many = [k for _, k in jobs if k > most or k < 1 and kind != "base"]
    if too_many:
        raise ValueError(f"{path} gives 1 to {most} tokens per image, but --k is {too_many[0]}.")
    images, texts = Images(reader), {}
    for task, k in jobs:
        start = time.perf_counter()
        if task in ANSWERED:
            found = answer(reader, images, task, k, selection)
        else:
            found = search(reader, images, texts, task, k, selection)
        seconds = round(time.perf_counter() - start, 1)
        found["items"] = [round(x, 5) if x % 1 else int(x) for x in found["items"]]
        # on one line, because there are many such files in the repository
        own = {"task": task, "k": k, "seconds": seconds, **about, "data": contents(task)}
        result = json.dumps({**own, **found}, ensure_ascii=False)
        write_text(result_file(work, method, task, k), result + "\n")
        print(f"{method} {task} k={k or 'dense'}: {found['figures']} ({seconds} s)", flush=True)


def is_done(file: Path, about: dict[str, Any], contents: Callable[[str], str]) -> bool:
    """Whether `file` holds this result.

    Args:
        contents: returns the digest of a task's items.

    Raises:
        ValueError: it holds a result of another model or of other items.
    """
    if not file.exists():
        return False
    found = read_json(file)

    def other(about: dict[str, Any]) -> list[str]:
        pairs = ((name, found.get(name, value), value) for name, value in about.items())
        return [f"{name} {own!r}, not {value!r}" for name, own, value in pairs if own != value]

    # settings first, because a digest of the items reads all images
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
    parser.add_argument("--work", type=Path, required=True, help="the folder of answers, to resume from")
    parser.add_argument("--run", action="append", default=[], metavar="METHOD=PATH", help="may be repeated")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tasks", nargs="+", default=[*ANSWERED, *SEARCHED], choices=[*ANSWERED, *SEARCHED])
    parser.add_argument("--limit", type=int, help="use only the first N images or questions of each task")
    parser.add_argument("--tuning", action="store_true", help="use the items held out for choosing settings")
    parser.add_argument(
        "--output", type=Path, help="NAME: writes NAME.json, NAME.md and NAME.png of all results in DIR"
    )
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    selection = Selection(arguments.data, arguments.limit, arguments.tuning)
    for entry in arguments.run:
        method, _, path = entry.partition("=")
        if not path:
            parser.error(f"--run takes METHOD=PATH, got {entry!r}")
        run(method, path, arguments.tasks, arguments.k, selection, arguments.work)
    if arguments.output:
        from .smol_report import report

        report(arguments.work, arguments.output, lambda task: images_of_items(task, selection))
    return 0


if __name__ == "__main__":
    sys.exit(main())
