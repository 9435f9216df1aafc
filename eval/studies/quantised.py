"""The study of smol-llava quantised: each precision of quantised_models.py compresses and answers, alone and in pairs.

exists       six yes/no questions, made POPE's way, about each of the first IMAGES of Flickr8k's dev split: accuracy
caption      one sentence for each of these images: CIDEr
retrieval    each of their captions among these images: R@1
sugarcrepe   about PAIRS of a true caption and a false one: how often the embedding of the true one is nearer
model, layers       bytes in memory; answer, compress: speed

Summaries are kept in float16, as a cache's codec of that name does.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.measure import environment, in_turn, summarize
from llava_fwd2bot.cache.summary_file import fingerprint_of
from llava_fwd2bot.checkpoint.read import read_checkpoint
from llava_fwd2bot.evaluation.answers import Answerer
from llava_fwd2bot.evaluation.encode import Encoder
from llava_fwd2bot.evaluation.tables import markdown
from llava_fwd2bot.hosts.opening import local_folder
from llava_fwd2bot.processing.conversation import ConversationFormatter
from llava_fwd2bot.processing.generate import from_summaries
from llava_fwd2bot.smol import instructions as make

from .quantised_models import bytes_of, bytes_of_shape, llava_7b, open_model
from .rows import Cell, Key, Rows
from .run import Job
from .smol import WORDS, answer, search
from .smol_items import ANSWERED, Selection, contents_of, images_of_items, questions_of

TASKS = ("exists", "caption", "retrieval", "sugarcrepe")
IMAGES, PAIRS = 60, 142
TOKENS, AT_ONCE, ROUNDS = 32, 8, 4  # of an answer that is timed; images compressed at once, where that is timed


def prepare(job: Job) -> None:
    """Nothing is trained."""


def contents(job: Job, task: str) -> str | None:
    """None where no photograph is looked at."""
    return contents_of(task, Selection(job.data, None if task == "sugarcrepe" else IMAGES)) if task in TASKS else None


def measure(job: Job, rows: Rows, keys: Sequence[Key]) -> None:
    """Measures `keys` of one row, which is called COMPRESSED BY → ANSWERED BY."""
    pair = Pair(job)
    for task, name, k, seed in keys:
        about, groups = job.about(task), [0]
        if task in TASKS:
            images = images_of_items(task, pair.selection(task))
            number = {image: i for i, image in enumerate(dict.fromkeys(images))}
            groups = [number[image] for image in images]
            items = pair.answered(task, k) if task in ANSWERED else pair.searched(task, k)
        else:
            items = [pair.sizes[task] if task in ("model", "layers") else pair.speed(task, about)]
        rows.add_task(task, groups)
        rows.add(Cell(task, name, k, seed, items, about))
        print(f"{task} {name}: {sum(items) / len(items):.4f}", flush=True)


class Pair:
    """Two precisions of a checkpoint; one model is in memory at a time."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder = job, local_folder(job.model, {})
        self.first, self.second = job.row.name.split(" → ")
        self._model: tuple[str, nn.Module, Any] | None = None

    def selection(self, task: str) -> Selection:
        return Selection(self.job.data, pairs=PAIRS) if task == "sugarcrepe" else Selection(self.job.data, IMAGES)

    def model(self, precision: str) -> tuple[nn.Module, Any]:
        if self._model is None or self._model[0] != precision:
            self._model = None
            self._model = (precision, *open_model(precision, self.job.model))
        return self._model[1:]

    def encoder(self, precision: str) -> Encoder:
        """Its summaries are kept, so that they are made once for all pairs."""
        work = self.job.work / "summaries" / precision.replace(" ", "-")
        return Encoder(*self.model(precision), f"{fingerprint_of(self.folder)} {precision}", work)

    def answered(self, task: str, k: int) -> list[float]:
        paths = questions_of(task, self.selection(task))[0]
        images = self.encoder(self.first).images(paths)
        answerer = Answerer(self.encoder(self.second), WORDS[task])
        answerer.encoder.images = lambda unique: images[[paths.index(path) for path in unique]]
        return answer(answerer, task, k, self.selection(task))[0]

    def searched(self, task: str, k: int) -> list[float]:
        pooling = read_checkpoint(self.folder)["fwd2bot"].pooling
        images, texts = (partial(self._encoded, *of) for of in ((self.first, "images"), (self.second, "texts")))
        return search(images, texts, pooling, task, k, self.selection(task))[0]

    def _encoded(self, precision: str, kind: str, items: Sequence[Any]) -> Tensor:
        return getattr(self.encoder(precision), kind)(items)

    @cached_property
    def sizes(self) -> dict[str, float]:
        """MB after an answer, as some layers repack their weights when they are first used."""
        self.one_answer(1)()
        model, _ = self.model(self.second)
        parts = {"model": model, "layers": model.model.language_model.layers}
        return {name: bytes_of(part) / 1e6 for name, part in parts.items()}

    def one_answer(self, tokens: int) -> Callable[[], Any]:
        """What gives one answer of so many tokens about the first image."""
        state: Tensor = self.encoder(self.second).images(self.selection("caption").flickr().paths[:1])
        model, processor = self.model(self.second)
        prompt = ConversationFormatter(processor).prompt(make.DESCRIBE)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return lambda: from_summaries(model, processor, [prompt], state.to(model.dtype), **options)

    def speed(self, task: str, about: dict[str, Any]) -> float:
        """Tokens or images a second, by the median of ROUNDS; `about` gets where."""
        paths: list[Path] = self.selection("caption").flickr().paths[:AT_ONCE]
        encoder = Encoder(*self.model(self.second), "")  # keeps nothing
        side = self.one_answer(TOKENS) if task == "answer" else lambda: encoder.images(paths)
        found = summarize(in_turn({task: side}, ROUNDS, torch.device("cpu"))[task])
        about |= {"seconds": found, "environment": about_here()}
        return {"answer": TOKENS, "compress": AT_ONCE}[task] / found["median"]


def about_here() -> dict[str, Any]:
    found = {**environment(torch.device("cpu")), "machine": platform.machine()}
    for name in ("bitsandbytes", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def shapes() -> list[dict[str, Any]]:
    """Bytes of LLaVA-1.5-7B with both adapters, counted from its shape: in bfloat16 and with NF4, double."""
    model, rows = llava_7b(), []
    for lora_r in (0, 16, 64):
        for tower in (False, True):
            whole, packed = (bytes_of_shape(model, lora_r, bits, tower=tower) for bits in (16, 4))
            rows.append({"lora_r": lora_r, "tower": tower, "bfloat16": whole, "nf4": packed, "ratio": packed / whole})
    return rows


def extra(study: Any, scores: Any) -> str:
    """The section of the report on LLaVA-1.5-7B."""
    sizes = [
        [str(row["lora_r"] or "none"), "yes" if row["tower"] else "no"]
        + [f"{row[name] / 1e9:.2f}" for name in ("bfloat16", "nf4")]
        + [f"{row['ratio']:.3f}"]
        for row in shapes()
    ]
    return (
        "## LLaVA-1.5-7B, counted\n\nBytes of the shape with both stages' adapters, not measured: bfloat16, and NF4 "
        "with double quantisation of the language model's linear layers, with the vision tower's as well where it says "
        "so.\n\n" + markdown(["LoRA rank", "tower in 4 bits", "GB, bfloat16", "GB, NF4", "ratio"], sizes)
    )
