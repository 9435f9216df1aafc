"""What each summary token looked at: its attention to the dense tokens in the compress pass.

Shapes: M images, k summary tokens, n dense tokens, H heads, L tokens of the compress pass, G = √n.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def attention_maps(model: nn.Module, *, num_tokens: int | None = None, **image_inputs: Any) -> Tensor:
    """Heat maps of the summary tokens over images, [M, k, G, G]: the mean over layers and heads of their attention.

    A map's sum is the share of the attention that goes to the image, at most 1; the rest goes to the prompt and to
    other summary tokens. The compress pass runs with eager attention, which is the one that keeps its weights: memory
    is that of H · L² weights of one layer.

    Args:
        image_inputs: as of `model.compress`.

    Raises:
        ValueError: the dense tokens of an image are no square grid, as LLaVA-NeXT's crops are not.
    """
    language, k = model._language_model(), num_tokens or model.fwd2bot_config.num_summary_tokens
    dense = model._dense_tokens(**image_inputs)
    sides = [math.isqrt(len(v)) for v in dense]
    if any(side * side != len(v) or side != sides[0] for side, v in zip(sides, dense, strict=True)):
        raise ValueError(
            f"The dense tokens of the image ({', '.join(str(len(v)) for v in dense)}) are no square grid: there is no "
            "map of them."
        )
    n = len(dense[0])
    prompt = len(model.fwd2bot.image_prompt_ids)
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        weights = out[1]  # [M, H, L, L]
        if weights is None:
            raise ValueError(f"{type(module).__name__} gives no attention weights: there is no map of this host.")
        found.append(weights[:, :, n + prompt : n + prompt + k, :n].float().mean(1))  # [M, k, n]

    layers = [module for name, module in language.named_modules() if name.endswith("self_attn")]
    before = language.config._attn_implementation
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        language.set_attn_implementation("eager")
        model._compress(dense, model.fwd2bot.image_prompt_ids, k)
    finally:
        for hook in hooks:
            hook.remove()
        language.set_attn_implementation(before)
    if not found:
        raise ValueError(f"{type(language).__name__} has no layers called self_attn: there is no map of this host.")
    return torch.stack(found).mean(0).unflatten(-1, (sides[0], sides[0]))
