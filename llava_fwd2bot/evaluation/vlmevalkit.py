"""Fwd2Bot for VLMEvalKit, which has no plugin mechanism: add the class to its namespace, then name it in a config.

import vlmeval.vlm; from llava_fwd2bot.evaluation.vlmevalkit import Fwd2Bot; vlmeval.vlm.Fwd2Bot = Fwd2Bot
# run.py --config C.json, C = {"model": {"fwd2bot": {"class": "Fwd2Bot", "pretrained": "CKPT", "k": 8}}, "data": …}
"""

from __future__ import annotations

import string
from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from .. import load_fwd2bot
from ..processing.answer import answers_to
from ..processing.conversation import PLACEHOLDER, ConversationFormatter
from ..processing.images import open_image

OPTION = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
PROMPTED = ("MCQ", "Y/N", "VQA")  # VLMEvalKit's kinds of questions that LLaVA-1.5 was trained to end so


class Fwd2Bot(BaseModel):
    """A checkpoint with LLaVA-1.5's prompts: what it was trained on ends with how to answer."""

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

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` makes the prompts of a data set: of choices, yes or no, and short answers."""
        return self._kind(dataset) in PROMPTED

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The message of one row of VLMEvalKit's tables: images, then hint, question, options, how to answer.

        The wording is that of LLaVA-1.5's evaluation (its Evaluation.md and question files).
        """
        words = [line[name] for name in ("hint", "question") if _there(line, name)]
        options = [letter for letter in string.ascii_uppercase if _there(line, letter)]
        words += [f"{letter}. {line[letter]}" for letter in options]
        words.append(OPTION if options else SHORT)
        images = self.dump_image(line, dataset)
        images = [images] if isinstance(images, str) else images
        message = [{"type": "image", "value": str(image)} for image in images]
        return [*message, {"type": "text", "value": "\n".join(map(str, words))}]

    @staticmethod
    def _kind(dataset: str | None) -> str | None:
        from vlmeval.dataset import DATASET_TYPE

        return None if dataset is None else DATASET_TYPE(dataset)

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a message of texts and images (paths), in their order."""
        images = [open_image(part["value"]) for part in message if part["type"] == "image"]
        text = "\n".join(PLACEHOLDER if part["type"] == "image" else part["value"] for part in message)
        prompt = self.formatter.ask([{"from": "human", "value": text}])
        options = {"max_new_tokens": self.max_new_tokens}
        return answers_to(self.model, self.processor, [prompt], [images], self.from_base, self.k, options)[0]


def _there(line: Any, name: str) -> bool:
    """Whether a row of a table has a value; an empty cell of pandas is NaN."""
    return name in line and line[name] is not None and line[name] == line[name] and str(line[name]).strip() != ""
