"""Fwd2Bot as a model of lmms-eval: simple tasks (context and images) and chat tasks (messages), in batches.

python -m lmms_eval --model llava_fwd2bot --model_args pretrained=CKPT,k=8,cache=DIR --tasks pope --batch_size 16
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..cache.summary_file import fingerprint_of
from ..checkpoint.load import load_for_inference, load_fwd2bot
from ..compressors import check_prefix
from ..config import check_k
from ..hosts.opening import local_folder
from ..processing.conversation import PLACEHOLDER, ConversationFormatter
from ..processing.generate import from_base, from_summaries
from ..processing.images import open_image
from .encode import Encoder
from .likelihood import answer_scores

_GENERATE = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")  # of a task's generation_kwargs


@dataclass
class Row:
    """One request, ready for the model."""

    prompt: str
    images: list[Image.Image]
    context: str
    options: dict[str, Any]
    until: list[str]


class _Fwd2Bot(lmms):
    """Base of both task types.

    Args:
        pretrained: the checkpoint: a folder, a name on the hub, or smol-llava.
        k: answer from the first k summary tokens; default: all.
        cache: a folder that stores summaries by the image's pixels, for later tasks and runs.
        from_base: answer by the base, from all dense tokens, for comparison.
        base, dtype, attn_implementation, load_in_4bit, load_in_8bit: see `load_fwd2bot`.

    Raises:
        ValueError: an argument is unknown, or k exceeds the checkpoint's.
    """

    def __init__(
        self,
        pretrained: str,
        k: int | None = None,
        cache: str | None = None,
        from_base: bool = False,
        base: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        batch_size: int = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"llava_fwd2bot does not know these --model_args: {', '.join(sorted(unknown))}.")
        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.accelerator = accelerator
        place = str(device or accelerator.device) if self._world_size == 1 else str(accelerator.device)
        load = partial(load_fwd2bot, **({"attn_implementation": attn_implementation} if attn_implementation else {}))
        folder = local_folder(pretrained, {})
        loaded = load_for_inference(folder, base, place, dtype, load_in_4bit, load_in_8bit, load)
        self.model, self.processor = loaded
        check_k(self.model.fwd2bot_config, k)
        check_prefix(self.model.fwd2bot_config, k)
        self.k, self.from_base, self.batch_size = k, from_base, int(batch_size)
        width = "4bit" if load_in_4bit else "8bit" if load_in_8bit else ""
        work = None if cache is None else Path(cache)
        self.encoder = Encoder(self.model, self.processor, f"{fingerprint_of(folder)} {width}", work, self.batch_size)
        self.formatter = ConversationFormatter(self.processor)

    # ------------------------------------------------------------------ requests → rows
    def _row(self, args: tuple) -> Row:
        raise NotImplementedError

    def _given(self, args: tuple) -> dict[str, Any]:
        """The task's generation_kwargs."""
        raise NotImplementedError

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _options(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        options = {name: given[name] for name in _GENERATE if given.get(name) is not None}
        options.setdefault("max_new_tokens", 1024)
        if options.pop("do_sample", False) and options.get("temperature", 1.0) > 0:
            options["do_sample"] = True
        else:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
        until = given.get("until") or []
        return options, [until] if isinstance(until, str) else list(until)

    # ------------------------------------------------------------------ what lmms-eval calls
    def generate_until(self, requests: list[Any]) -> list[str]:
        """One text per request, in their order; requests with equal options and similar length share a batch."""
        # sorted without opening images: those of a whole task may exceed memory, so each batch opens its own
        given = [self._given(request.args) for request in requests]
        keys = [json.dumps(self._options(own)[0], sort_keys=True) for own in given]
        order = sorted(range(len(requests)), key=lambda i: (keys[i], len(requests[i].args[0] or ""), i))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="llava_fwd2bot", disable=self._rank != 0) as bar:
            while order:
                part = [i for i in order[: self.batch_size] if keys[i] == keys[order[0]]]
                order = order[len(part) :]
                rows = [self._row(requests[i].args) for i in part]
                for i, row, text in zip(part, rows, self._texts(rows), strict=True):
                    for stop in row.until:
                        text = text.split(stop)[0]
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", (row.context, given[i]), text)
                bar.update(len(part))
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(loss, whether greedy decoding gives the target) for each request.

        The loss is the mean negative log-probability per token, as lmms-eval's own models give it: where a task has
        choices, lmms-eval chooses the smallest.
        """
        if self.from_base:
            raise ValueError("from_base supports generate_until tasks only; this task needs likelihoods.")
        found = []
        for request in tqdm(requests, desc="llava_fwd2bot", disable=self._rank != 0):
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
            images = _images_of(doc_to_visual(doc))
            summary = self._summaries(images)
            scores = answer_scores(self.model, self.processor, summary, [_with_images(context, len(images))], [target])
            total, count, greedy = scores[0]
            found.append((-total / count, greedy))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("llava_fwd2bot supports tasks of one round; this task has several.")

    # ------------------------------------------------------------------ the model
    def _texts(self, rows: Sequence[Row]) -> list[str]:
        options = rows[0].options
        if self.from_base:
            return [from_base(self.model, self.processor, r.prompt, r.images, **options)[0] for r in rows]
        summary = self._summaries([image for row in rows for image in row.images])
        return from_summaries(self.model, self.processor, [row.prompt for row in rows], summary, **options)

    def _summaries(self, images: Sequence[Image.Image]) -> Tensor | None:
        """[M, k, D], from the cache where it has them."""
        return self.encoder.pictures(images)[:, : self.k] if images else None


def _images_of(visuals: Any) -> list[Image.Image]:
    found = []
    for visual in visuals or []:
        if isinstance(visual, (str, os.PathLike)):
            visual = open_image(visual)
        if not isinstance(visual, Image.Image):
            raise ValueError(f"llava_fwd2bot reads images; this task gave {type(visual).__name__}.")
        found.append(visual.convert("RGB"))
    return found


def _with_images(context: str, count: int) -> str:
    """The context with its image placeholders in front, unless it has them already."""
    present = context.count(PLACEHOLDER)
    return context if present == count else f"{PLACEHOLDER}\n" * count + context.replace(PLACEHOLDER, "")


class Fwd2BotSimple(_Fwd2Bot):
    is_simple = True

    def _given(self, args: tuple) -> dict[str, Any]:
        return args[1]

    def _row(self, args: tuple) -> Row:
        context, given, doc_to_visual, doc_id, task, split = args
        images = _images_of(doc_to_visual(self._doc(task, split, doc_id)))
        prompt = self.formatter.prompt(_with_images(context, len(images)), len(images))
        return Row(prompt, images, context, *self._options(given))


class Fwd2BotChat(_Fwd2Bot):
    is_simple = False

    def _given(self, args: tuple) -> dict[str, Any]:
        return args[2]

    def _row(self, args: tuple) -> Row:
        context, doc_to_messages, given, doc_id, task, split = args
        images: list[Any] = []
        turns: list[dict[str, str]] = []
        for message in doc_to_messages(self._doc(task, split, doc_id)):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = []
            for part in parts:
                if part["type"] == "text":
                    texts.append(part["text"])
                elif part["type"] == "image":
                    images.append(part["url"])
                    texts.append(PLACEHOLDER)
                else:
                    raise ValueError(f"llava_fwd2bot reads images and text; this task gave {part['type']}.")
            if message["role"] == "system":  # LLaVA's formats have their own
                continue
            turns.append({"from": "gpt" if message["role"] == "assistant" else "human", "value": "\n".join(texts)})
        return Row(self.formatter.ask(turns), _images_of(images), context, *self._options(given))
