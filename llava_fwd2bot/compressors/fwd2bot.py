"""Compressors that are a pass of the language model: the paper's, and the last token's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..bottleneck import compress_pass
from .base import Compressor


class Fwd2Bot(Compressor):
    name = "fwd2bot"
    about = "the language model's outputs at k learned summary tokens"
    source = "arXiv 2503.21757"
    runs_language_model = True
    compares_texts = True

    def images(self, model: Any, dense: Sequence[Tensor], j: int) -> Tensor:
        added = model.fwd2bot
        with model._stages.use("compress"):
            prompt = model.get_input_embeddings()(added.image_prompt_ids)
            if model._residual is None:
                return compress_pass(model._language_model(), dense, prompt, added.tokens[:j])
            averages = model._residual.averages(dense, j)  # M × [j, D]
            out = compress_pass(model._language_model(), dense, prompt, added.tokens[:j], averages)
            return torch.stack(averages).to(out) + added.log_gain.exp().to(out) * out

    def texts(self, model: Any, words: Sequence[Tensor], j: int) -> Tensor:
        # a text's summary is for retrieval alone, and there is no average to start from
        with model._stages.use("compress"):
            prompt = model.get_input_embeddings()(model.fwd2bot.text_prompt_ids)
            return compress_pass(model._language_model(), words, prompt, model.fwd2bot.tokens[:j])


class LastToken(Compressor):
    name = "last"
    about = "the language model's output at the last token of the prompt"
    source = "VladVA, arXiv 2412.04378"
    runs_language_model = True
    compares_texts = True
    max_tokens = 1

    def images(self, model: Any, dense: Sequence[Tensor], j: int) -> Tensor:
        return self._last(model, dense, model.fwd2bot.image_prompt_ids)

    def texts(self, model: Any, words: Sequence[Tensor], j: int) -> Tensor:
        return self._last(model, words, model.fwd2bot.text_prompt_ids)

    def _last(self, model: Any, contexts: Sequence[Tensor], prompt_ids: Tensor) -> Tensor:
        if not len(prompt_ids):
            raise ValueError("The compressor 'last' reads the output at the prompt's last token: the prompt is empty.")
        with model._stages.use("compress"):
            prompt = model.get_input_embeddings()(prompt_ids)
            return compress_pass(model._language_model(), contexts, prompt[:-1], prompt[-1:])
