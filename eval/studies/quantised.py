"""smol-llava quantised: what it costs in answers and retrieval, and what it saves in memory.

    python -m eval.studies.quantised --data DATA --output eval/results/quantised.json

Each precision of quantised_models.py compresses the images and texts once and answers; and with one stage quantised
alone: a cache filled by the float model and answered by a quantised one, and the reverse. OUTPUT is written after each
part, and a part that is in it is not done again. Summaries are kept in float16, as a cache's codec of that name does.

exists       six yes/no questions, made POPE's way, about each of the first IMAGES of Flickr8k's dev split: accuracy
caption      one sentence for each of these images: CIDEr
retrieval    each of their captions among these images: R@1
sugarcrepe   about PAIRS of a true caption and a false one: how often the embedding of the true one is nearer
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from eval.measure import environment, in_turn, summarize
from llava_fwd2bot.bottleneck import embed
from llava_fwd2bot.cache.summary_file import fingerprint_of, write_tensors
from llava_fwd2bot.checkpoint.read import read_checkpoint
from llava_fwd2bot.evaluation.encode import Encoder
from llava_fwd2bot.evaluation.retrieval import ranks
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_json, write_text
from llava_fwd2bot.hosts.opening import local_folder
from llava_fwd2bot.processing.conversation import ConversationFormatter
from llava_fwd2bot.processing.generate import from_summaries
from llava_fwd2bot.smol import instructions as make

from .quantised_document import IMAGES, TASKS, TOKENS, document, table
from .quantised_models import FLOAT, PRECISIONS, bytes_of, bytes_of_shape, llava_7b, open_model
from .smol import score
from .smol_items import Selection, contents_of, questions_of, sugarcrepe_items

ALONE = ("8-bit", "nf4 double")  # also measured with one stage quantised
HEADLINE = {"exists": "accuracy", "caption": "cider"}
WORDS = {"exists": 8, "caption": 30}


class Study:
    """The parts that are done, in the file `output`; one model at a time; summaries, kept in the folder `work`."""

    def __init__(
        self, data: Path, output: Path, work: Path, images: int, pairs: int, checkpoint: str = "smol-llava"
    ) -> None:
        self.output, self.checkpoint, self.selection = output, checkpoint, Selection(data, images)
        rows, _ = sugarcrepe_items(Selection(data))
        self.pairs = rows[:: max(1, len(rows) // pairs)]  # evenly over the kinds, which stand one after the other
        about = {
            "fingerprint": fingerprint_of(local_folder(checkpoint, {})),
            "images": images,
            "pairs": len(self.pairs),
        }
        about["data"] = {task: contents_of(task, self.selection) for task in ("exists", "caption", "retrieval")}
        about["data"]["sugarcrepe"] = contents_of("sugarcrepe", Selection(data))
        self.found: dict[str, Any] = read_json(output) if output.is_file() else {"about": about, "parts": {}}
        if self.found["about"] != about:
            raise ValueError(f"{output} is of another checkpoint, data, --images or --pairs: name another one.")
        self.work = work / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self._model: tuple[str, nn.Module, Any] | None = None
        self._states: dict[Path, Tensor] = {}

    def model(self, precision: str) -> tuple[nn.Module, Any]:
        if self._model is None or self._model[0] != precision:
            self._model = None
            self._model = (precision, *open_model(precision, self.checkpoint))
        return self._model[1:]

    def states(self, kind: str, precision: str) -> Tensor:
        """Summaries [N, k, D] in float16 of one kind of `items`, in their order."""
        file = self.work / f"{kind}.{precision}.safetensors"
        if file not in self._states and file.is_file():
            self._states[file] = load_file(file)["summary"]
        if file not in self._states:
            encoder = Encoder(*self.model(precision), self.found["about"]["fingerprint"])
            items = self.items(kind)
            made = encoder.images(items) if kind.endswith("images") else encoder.texts(items)
            self.work.mkdir(parents=True, exist_ok=True)
            write_tensors({"summary": made}, file)
            self._states[file] = made
        return self._states[file]

    def items(self, kind: str) -> list[Any]:
        """What is compressed, each once: "flickr images", "flickr texts", "coco images" or "coco texts"."""
        if kind == "coco images":
            return list(dict.fromkeys(row[0] for row in self.pairs))
        if kind == "coco texts":
            return list(dict.fromkeys(make.tidy(text) for row in self.pairs for text in row[1:]))
        split = self.selection.flickr()
        return split.paths if kind == "flickr images" else [make.tidy(c) for own in split.captions for c in own]

    # ------------------------------------------------------------------ one part each
    def answered(self, task: str, compressed_by: str, answered_by: str) -> dict[str, Any]:
        images = self.states("flickr images", compressed_by)
        model, processor = self.model(answered_by)
        _, owner, questions, truth = questions_of(task, self.selection)
        prompt = ConversationFormatter(processor).prompt
        order, said = sorted(range(len(questions)), key=lambda i: (len(questions[i]), i)), [""] * len(questions)
        for at in tqdm(range(0, len(order), 16), desc=f"{task}: {compressed_by} → {answered_by}"):
            part = order[at : at + 16]
            states = images[[owner[i] for i in part]].to(model.dtype)
            prompts = [prompt(questions[i]) for i in part]
            texts = from_summaries(model, processor, prompts, states, max_new_tokens=WORDS[task])
            for i, text in zip(part, texts, strict=True):
                said[i] = text
        found = score(task, said, truth)
        value = found["figures"][HEADLINE[task]]
        return {"value": value, "items": [round(x, 4) for x in found["items"]], "groups": owner}

    def searched(self, task: str, images_by: str, texts_by: str) -> dict[str, Any]:
        where = "flickr" if task == "retrieval" else "coco"
        images, texts = self.states(f"{where} images", images_by), self.states(f"{where} texts", texts_by)
        pooling = read_checkpoint(local_folder(self.checkpoint, {}))["fwd2bot"].pooling
        images, texts = embed(images.float(), pooling), embed(texts.float(), pooling)
        if task == "retrieval":
            groups = [i for i, own in enumerate(self.selection.flickr().captions) for _ in own]
            items = (ranks(images, texts, torch.tensor(groups))[0] < 1).double().tolist()
        else:
            at = {path: i for i, path in enumerate(self.items("coco images"))}
            place = {text: i for i, text in enumerate(self.items("coco texts"))}
            groups = [at[row[0]] for row in self.pairs]
            true, false = (texts[[place[make.tidy(row[n])] for row in self.pairs]] for n in (1, 2))
            items = ((images[groups] * true).sum(1) > (images[groups] * false).sum(1)).double().tolist()
        return {"value": sum(items) / len(items), "items": items, "groups": groups}

    def run(self, precisions: Sequence[str], rounds: int) -> None:
        """All that is not done yet, by the model that answers, so that each is opened once and the float one twice."""
        alone = [p for p in ALONE if p in precisions]
        pairs = [pair for p in precisions for pair in ((p, p), *([(FLOAT, p)] if p in alone else []))]
        pairs += [(p, FLOAT) for p in alone]
        for first, second in pairs:
            for task in TASKS:
                name = f"{task} {first} → {second}"
                if name not in self.found["parts"]:
                    do = self.answered if task in WORDS else self.searched
                    self.found["parts"][name] = do(task, first, second)
                    self.save()
                    print(f"{name}: {self.found['parts'][name]['value']:.4f}", flush=True)
        for precision in precisions:
            if precision not in self.found.setdefault("memory", {}):
                self.found["memory"][precision] = self.sizes(precision)
                self.save()
        if {f"answer {precision}" for precision in precisions} - set(self.found.get("seconds", {})):
            self.found |= {"seconds": self.speeds(precisions, rounds), "environment": about_here()}
            self.save()

    def save(self) -> None:
        write_json(self.output, self.found)

    def sizes(self, precision: str) -> dict[str, int]:
        """Bytes after an answer, as some layers repack their weights when they are first used."""
        model, _ = self.model(precision)
        self.ask(precision, 1)()
        return {"model": bytes_of(model), "layers": bytes_of(model.model.language_model.layers)}

    def ask(self, precision: str, tokens: int) -> Callable[[], Any]:
        """What gives one answer of so many tokens about the first image."""
        model, processor = self.model(precision)
        state = self.states("flickr images", precision)[:1].to(model.dtype)
        prompt = ConversationFormatter(processor).prompt(make.DESCRIBE)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return lambda: from_summaries(model, processor, [prompt], state, **options)

    def speeds(self, precisions: Sequence[str], rounds: int) -> dict[str, Any]:
        """Seconds of an answer of TOKENS tokens and of compressing IMAGES images, all models in turn."""
        sides: dict[str, Callable[[], Any]] = {}
        paths = self.selection.flickr().paths[:IMAGES]
        for name in precisions:
            sides[f"answer {name}"] = self.ask(name, TOKENS)
            encoder = Encoder(*self.model(name), name)
            sides[f"compress {name}"] = partial(encoder.images, paths)
        return {name: summarize(seconds) for name, seconds in in_turn(sides, rounds, torch.device("cpu")).items()}


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with flickr8k, coco_val2017 and bench")
    parser.add_argument("--output", type=Path, required=True, help="NAME.json; NAME.md is written beside it")
    parser.add_argument("--work", type=Path, help="where summaries are kept; default: NAME.work beside the output")
    parser.add_argument("--model", default="smol-llava", help="the checkpoint; default: smol-llava")
    parser.add_argument("--images", type=int, default=60, help="of Flickr8k's dev split; default: 60")
    parser.add_argument("--pairs", type=int, default=142, help="of SugarCrepe's 426 with an image; default: 142")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=4, help="in which all models are timed in turn; default: 4")
    arguments = parser.parse_args(argv)
    if FLOAT not in arguments.precisions:
        parser.error(f"--precisions needs {FLOAT}, with which the others are compared")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    work = arguments.work or arguments.output.with_suffix(".work")
    study = Study(arguments.data, arguments.output, work, arguments.images, arguments.pairs, arguments.model)
    study.found["shapes"] = shapes()
    study.run(arguments.precisions, arguments.rounds)
    write_text(arguments.output.with_suffix(".md"), document(study.found))
    print(table(study.found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
