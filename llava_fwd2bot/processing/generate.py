"""Texts from prompts in a batch: by Fwd2Bot from summaries, or by the base from images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .conversation import needs_bos, prompt_ids
from .images import check_sizes, join_pixels, prepare_pixels

GREEDY = {"do_sample": False}


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Within it a batch's first tokens cost what they should on a CPU in bfloat16.

    `generate` gives the head the last token's states, a strided slice; of such a one the product copies the whole head
    for every row of the batch, which was nine tenths of the time of short answers.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def summaries_of(model: Any, processor: Any, images: Sequence[Image.Image], k: int | None = None) -> Tensor:
    """The summaries of `images`, compressed in one batch, [M, k, D]."""
    pixels = [prepare_pixels(processor, model, [image]) for image in images]
    return model.compress(**join_pixels(pixels, model.get_input_embeddings().weight), num_tokens=k)


@torch.inference_mode()
def from_summaries(
    model: Any, processor: Any, prompts: Sequence[str], summary: Tensor | None, **options: Any
) -> list[str]:
    """One text for each prompt.

    Args:
        prompts: with one image token for each image.
        summary: [M, k, D] of the images of all prompts in order; None where there is none.
        options: of `generate`.
    """
    rows = [prompt_ids(processor, prompt)["input_ids"][0] for prompt in prompts]
    ids, mask = _left_padded(rows, processor.tokenizer.pad_token_id)
    device = model.get_input_embeddings().weight.device
    given = {"input_ids": ids.to(device), "attention_mask": mask.to(device), **GREEDY, **options}
    if summary is not None:
        given["summary"] = summary.to(device)
    with contiguous_head(model):
        out = model.generate(**given)
    return _texts(model, processor, out, ids.shape[1])


@torch.inference_mode()
def from_base(model: Any, processor: Any, prompt: str, images: Sequence[Image.Image], **options: Any) -> list[str]:
    """The base's text for one prompt, from all dense tokens; Fwd2Bot, where it is on the model, is off meanwhile.

    One prompt at a time: with crops n differs, and padding around images is each host's own affair.
    """
    like = model.get_input_embeddings().weight
    if hasattr(processor, "tokenize") or not images:  # the original LLaVA: one id for an image
        given = {"input_ids": prompt_ids(processor, prompt)["input_ids"].to(like.device)}
        if images:
            given |= join_pixels([prepare_pixels(processor, model, images)], like)
    else:
        check_sizes(processor, images)
        special = needs_bos(processor.tokenizer, prompt)
        given = processor(text=prompt, images=list(images), return_tensors="pt", add_special_tokens=special)
        given = dict(given.to(like.device, like.dtype))
    with model.fwd2bot_disabled() if hasattr(model, "fwd2bot") else nullcontext():
        out = model.generate(**{**given, **GREEDY, **options})
    return _texts(model, processor, out, given["input_ids"].shape[1])


def _left_padded(rows: Sequence[Tensor], pad: int | None) -> tuple[Tensor, Tensor]:
    """[B, T] and its mask."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 0 if pad is None else pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask


def _texts(model: Any, processor: Any, out: Tensor, prompt_length: int) -> list[str]:
    new = out[:, prompt_length:] if getattr(model, "prompt_in_output", True) else out
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
