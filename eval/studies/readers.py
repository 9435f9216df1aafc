"""The methods of the study of smol-llava, opened so that all are read alike: by `Encoder`, `Answerer` and `ranks`.

Shapes: M images, Q questions, n dense tokens, k tokens in use, T prompt tokens, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from llava_fwd2bot import load_fwd2bot, register
from llava_fwd2bot.checkpoint.load import base_source

from .rivals import RIVALS, PooledLlava

PRUNING_LAYER = 2  # FastV's


class PrunedLlava(LlavaForConditionalGeneration):
    """The k dense tokens that the prompt's last token attends to most in an early layer (as FastV, arXiv 2403.06764).

    Needs no training. It depends on the question, so that no summary can be stored: what stands for one is all dense
    tokens, of which `generate` keeps `kept`. Unlike in FastV, the layers before the choice see k tokens too, so that
    the budget equals that of the other methods.
    """

    image_input_names = ("pixel_values",)
    kept = 1  # k

    def compress(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, S, S] → [M, n, D]"""
        found = self.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        return torch.stack(list(found.pooler_output))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, summary: Tensor, **options: Any) -> Tensor:
        """The ids with the answers after them; each row has one image: [Q, T], [Q, T], [Q, n, D] → [Q, T + new]"""
        best = self.attention(input_ids, attention_mask, summary).topk(self.kept, dim=1).indices
        best = best.sort(dim=1).values  # in the picture's order
        chosen = summary.gather(1, best[..., None].expand(-1, -1, summary.shape[-1]))
        rows, mask, _ = self._rows(input_ids, attention_mask, chosen)
        return torch.cat([input_ids, super().generate(inputs_embeds=rows, attention_mask=mask, **options)], 1)

    def attention(self, input_ids: Tensor, attention_mask: Tensor, visual: Tensor) -> Tensor:
        """Attention of the prompt's last token to each visual token, averaged over heads, [Q, n]"""
        rows, mask, is_image = self._rows(input_ids, attention_mask, visual)
        with _first_layers(self.model.language_model, PRUNING_LAYER + 1) as language_model:
            seen = language_model(inputs_embeds=rows, attention_mask=mask, output_attentions=True).attentions
        return seen[-1][:, :, -1].float().mean(1)[is_image].view(len(visual), -1)

    def _rows(self, input_ids: Tensor, attention_mask: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings with `visual` in the place of the image, their mask, and where the image is; each over [Q, L]."""
        times = torch.where(input_ids == self.config.image_token_id, visual.shape[1], 1).flatten()
        ids, mask = (x.flatten().repeat_interleave(times).view(len(x), -1) for x in (input_ids, attention_mask))
        words, is_image = self.get_input_embeddings()(ids), ids == self.config.image_token_id
        return words.masked_scatter(is_image[..., None], visual.to(words.dtype)), mask, is_image


@contextmanager
def _first_layers(language_model: nn.Module, count: int) -> Iterator[nn.Module]:
    layers, implementation = language_model.layers, language_model.config._attn_implementation
    language_model.layers = layers[:count]
    language_model.set_attn_implementation("eager")  # other implementations return no attention maps
    try:
        yield language_model
    finally:
        language_model.layers = layers
        language_model.set_attn_implementation(implementation)


def open_method(method: str, path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Any]:
    """The model and the processor of a method: "base" and "prune" open a base, those of `RIVALS` a checkpoint.

    Raises:
        ValueError: the method is unknown.
    """
    register()
    if method in ("base", "prune"):
        source = base_source(str(path))
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).eval()
        if method == "prune":  # not opened as such: transformers tells the names of weights by the class's
            model.__class__ = PrunedLlava
        return model, AutoProcessor.from_pretrained(source)
    if method not in RIVALS:
        raise ValueError(f"unknown method {method!r}; choose base, prune, {', '.join(RIVALS)}")
    model, processor = load_fwd2bot(path, host=RIVALS[method], dtype=dtype)
    return model.to(dtype).eval(), processor


def most_tokens(model: nn.Module) -> int:
    """The largest k, which is n where there is no Fwd2Bot."""
    config = getattr(model, "fwd2bot_config", None)
    return model.config.image_seq_length if config is None else config.num_summary_tokens


def set_tokens(model: nn.Module, k: int) -> int:
    """Sets k where the tokens for fewer are no prefix; returns how many of an image's stored rows are read."""
    if isinstance(model, PooledLlava):
        model.compress = partial(PooledLlava.compress, model, num_tokens=k)
    elif isinstance(model, PrunedLlava):
        model.kept = k
        return most_tokens(model)
    return k
