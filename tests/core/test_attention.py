"""Attention maps: the shares of the eager pass, for each image by itself, and nothing of the model changed by them."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZE

from llava_fwd2bot.modeling.attention import attention_maps


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_maps_are_shares(model64):
    """[M, k, G, G]; what is not given to the image goes to the prompt and to other summary tokens."""
    maps = attention_maps(model64, pixel_values=pixels())
    assert maps.shape == (2, 4, 4, 4)
    sums = maps.sum((-1, -2))
    assert bool((maps >= 0).all()) and bool((sums > 0).all()) and bool((sums <= 1).all())


def test_maps_are_of_the_compress_pass(model64):
    """By hand, from the attention weights that the language model returns; and the first j maps do not see the rest."""
    maps = attention_maps(model64, pixel_values=pixels())
    with torch.no_grad(), model64._stages.use("compress"):
        language = model64._language_model()
        language.set_attn_implementation("eager")
        dense = torch.stack(model64._dense_tokens(pixel_values=pixels()))
        prompt = model64.get_input_embeddings()(model64.fwd2bot.image_prompt_ids).expand(2, -1, -1)
        rows = torch.cat([dense, prompt, model64.fwd2bot.tokens.expand(2, -1, -1)], 1)
        weights = torch.stack(language(inputs_embeds=rows, output_attentions=True).attentions)
        language.set_attn_implementation("sdpa")
    expected = weights.mean((0, 2))[:, -4:, :16].unflatten(-1, (4, 4)).float()
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attention_maps(model64, pixel_values=pixels(), num_tokens=2), maps[:, :2])


def test_the_model_is_as_before(model64):
    """Summaries are the same, bit for bit, and no hook is left."""
    before = model64.compress(pixels())
    attention_maps(model64, pixel_values=pixels(1))
    assert torch.equal(model64.compress(pixels()), before)
    assert not any(module._forward_hooks for module in model64._language_model().modules())
    assert model64._language_model().config._attn_implementation == "sdpa"


def test_no_grid_no_map(model64, monkeypatch):
    """LLaVA-NeXT's crops and line ends are no picture that a map could be laid on."""
    monkeypatch.setattr(type(model64), "_dense_tokens", lambda self, **given: [torch.zeros(15, 64)])
    with pytest.raises(ValueError, match="no square grid"):
        attention_maps(model64, pixel_values=pixels(1))
