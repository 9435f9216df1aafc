"""Fwd2Bot for VLMEvalKit, which has no plugin mechanism: add the class to its namespace, then name it in a config.

import vlmeval.vlm; from llava_fwd2bot.evaluation.vlmevalkit import Fwd2Bot; vlmeval.vlm.Fwd2Bot = Fwd2Bot
# run.py --config C.json, C = {"model": {"fwd2bot": {"class": "Fwd2Bot", "pretrained": "CKPT", "k": 8}}, "data": …}
"""

from __future__ import annotations

from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from .. import load_fwd2bot
from ..processing.conversation import PLACEHOLDER, ConversationFormatter
from ..processing.generate import from_base, from_summaries, summaries_of
from ..processing.images import open_image


class Fwd2Bot(BaseModel):
    INTERLEAVE = True

    def __init__(
        self, pretrained: str, k: int | None = None, max_new_tokens: int = 512, from_base: bool = False, **loading: Any
    ) -> None:
        super().__init__()
        self.model, self.processor = load_fwd2bot(pretrained, **loading)
        if torch.cuda.is_available() and not getattr(self.model, "is_quantized", False):
            self.model.cuda()
        self.k, self.max_new_tokens, self.from_base = k, max_new_tokens, from_base
        self.formatter = ConversationFormatter(self.processor)

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a message of texts and images (paths), in their order."""
        images = [open_image(part["value"]) for part in message if part["type"] == "image"]
        text = "\n".join(PLACEHOLDER if part["type"] == "image" else part["value"] for part in message)
        prompt = self.formatter.ask([{"from": "human", "value": text}])
        loaded = (self.model, self.processor)
        if self.from_base:
            return from_base(*loaded, prompt, images, max_new_tokens=self.max_new_tokens)[0]
        summary = None
        if images:
            summary = summaries_of(*loaded, images, self.k)
        return from_summaries(*loaded, [prompt], summary, max_new_tokens=self.max_new_tokens)[0]
