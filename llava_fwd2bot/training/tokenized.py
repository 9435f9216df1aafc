"""Text to ids and labels, also where it quotes the image token: in rows without an image it is text, as in LLaVA."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer

from ..processing.conversation import needs_bos
from .collator import IGNORE_INDEX


def with_labels(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of `text`, [T], and its labels, [T]: the ids in the answers' spans, IGNORE_INDEX elsewhere."""
    options = {"add_special_tokens": needs_bos(tokenizer, text), "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(text, **options)
    ids = torch.tensor(encoded["input_ids"])
    labels = torch.full_like(ids, IGNORE_INDEX)
    # A token counts if it overlaps an answer: "▁word" may begin with a space that belongs to the prompt.
    start, end = torch.tensor(encoded["offset_mapping"]).unbind(-1)
    for first, last in spans:
        inside = (start < last) & (torch.maximum(end, start + 1) > first)
        labels[inside] = ids[inside]
    return ids, labels


class QuotingTokenizer:
    """A fast tokenizer for which the image token is not special: its letters become ordinary ids.

    Args:
        tokenizer: the processor's own, which stays as it is.
        image_token: the text that stands for an image elsewhere.
    """

    def __init__(self, tokenizer: Any, image_token: str):
        self.bos_token = tokenizer.bos_token
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] != image_token]
        state.update(truncation=None, padding=None)  # of the tokenizer's last call
        self._tokenizer = Tokenizer.from_str(json.dumps(state))

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list]:
        """The ids of `text` and their [start, end) in it, under the names that transformers has for them."""
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": found.ids, "offset_mapping": found.offsets}


def repeat_images(
    ids: torch.Tensor, labels: torch.Tensor, is_image: torch.Tensor, counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Each picture's id as many times as it has dense tokens, without labels.

    Args:
        ids, labels, is_image: [T'], with one id per picture. counts: dense tokens of each picture, in order.

    Returns:
        ids [T], labels [T], and where the last picture ends, 0 without pictures.
    """
    repeats = torch.ones_like(ids)
    repeats[is_image] = torch.tensor(counts, dtype=torch.long)
    labels = labels.masked_fill(is_image, IGNORE_INDEX)
    ids, labels, is_image = (x.repeat_interleave(repeats) for x in (ids, labels, is_image))
    return ids, labels, int(is_image.nonzero()[-1]) + 1 if counts else 0
