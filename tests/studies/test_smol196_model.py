"""The study smol196: its own fast model against transformers' and the package's."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import settings, shake, toy_base

from eval.studies.smol196 import weights
from eval.studies.smol196.compressors import Compressor
from eval.studies.smol196.data import Batch, Prompts
from eval.studies.smol196.model import PROJECTIONS, Language, Lora, Projector, Shape
from eval.studies.smol196.recipes import Recipe
from eval.studies.smol196.rows import Memory, Rows, answer_rows, offsets
from llava_fwd2bot import add_fwd2bot

SHAPE = Shape(vocabulary=90, hidden=128, wide=160, layers=2, heads=2, groups=1)
NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
NAMES |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def as_language(model: torch.nn.Module) -> Language:
    """transformers' Llama with tied embeddings, as the study's `Language`."""
    c = model.config
    sizes = (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers)
    theta = c.rope_parameters["rope_theta"]
    language = Language(Shape(*sizes, c.num_attention_heads, c.num_key_value_heads, theta, c.rms_norm_eps)).to(
        next(model.parameters()).dtype
    )
    state = {n: torch.stack([layer.get_submodule(NAMES[n]).weight for layer in model.layers]) for n in PROJECTIONS}
    state["norm_in"] = torch.stack([layer.input_layernorm.weight for layer in model.layers])
    state["norm_mlp"] = torch.stack([layer.post_attention_layernorm.weight for layer in model.layers])
    state |= {"norm_out": model.norm.weight, "words": model.embed_tokens.weight}
    language.load_state_dict(state)
    return language


def as_lora(model: torch.nn.Module, stage: str, rank: int, shape: Shape) -> Lora:
    """One of the package's adapters as the study's."""
    tensors, lora = model._stages.tensors(stage), Lora(shape, rank)
    with torch.no_grad():
        for name in PROJECTIONS:
            for part, side in ((lora.down, "lora_A"), (lora.up, "lora_B")):
                found = [t for key, t in tensors.items() if f"{NAMES[name]}.{side}." in key]
                part[f"_{name}"].copy_(torch.stack(found))
    return lora


def text_rows(tokens: torch.Tensor, segment: torch.Tensor, ahead: torch.Tensor) -> Rows:
    return Rows(tokens, segment, offsets(segment), ahead, tokens.flatten().roll(-1)[ahead])


@pytest.mark.parametrize("residual", ["none", "average", "pool"])
def test_losses_are_the_packages(processor, residual, monkeypatch):
    """The study's rows, merged adapters and losses must be Fwd2Bot's own, or what it finds says nothing of it."""
    base = toy_base(processor)
    base.lm_head.weight = base.get_input_embeddings().weight
    config = settings(num_summary_tokens=16, residual=residual, lora_alpha=8, pooling="mean")
    model = shake(add_fwd2bot(base, config, processor))
    language = as_language(model.model.language_model)
    chosen = Recipe("test", "fwd2bot", rank=4, contrastive=1.0, residual=residual)
    tokens = model.fwd2bot
    prefix = torch.tensor([1, 300])
    prompts = Prompts(prefix, tokens.image_prompt_ids.tolist(), tokens.text_prompt_ids.tolist(), 2)
    projector = Projector(8, 64, 196)
    ours = Compressor(chosen, language, projector, prompts)
    ours.own["tokens"].load_state_dict(tokens.state_dict())
    ours.compress, ours.answer = (as_lora(model, s, 4, language.shape) for s in ("compress", "answer"))

    raw = torch.randint(0, 255, (3, 227, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dense = ours.dense(raw).detach()
    monkeypatch.setattr(model, "_dense_tokens", lambda **_: list(dense))
    text = torch.tensor([[310, 311, 312, 313, 2], [314, 315, 316, 2, 0], [317, 318, 319, 320, 2]])
    segment = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labelled = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    captions, lengths = torch.tensor([[330, 331, 332], [333, 334, 0], [335, 336, 337]]), [3, 2, 3]
    image = torch.full((3, 1), model.config.image_token_id)
    ids = torch.cat([prefix.expand(3, -1), image, text], dim=1)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.long), segment], dim=1)
    labels = torch.cat([torch.full((3, 3), -100), text.masked_fill(~labelled, -100)], dim=1)
    theirs = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        pixel_values=torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 32, 32),  # equal images are one another's pair
        caption_input_ids=captions,
        caption_attention_mask=(captions > 0).long(),
    )
    ahead = labelled.flatten().nonzero().flatten() - 1
    k = torch.full((3,), 16)
    batch = Batch(raw, text_rows(text, segment, ahead), k, 16, captions, lengths)
    found = ours.losses(batch)
    torch.testing.assert_close(found["answer"], theirs.answer_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["contrastive"], theirs.contrastive_loss, rtol=1e-4, atol=1e-4)
    theirs.loss.backward()
    found["loss"].backward()
    mine = ours.own["tokens"].tokens.grad
    torch.testing.assert_close(mine, tokens.tokens.grad, rtol=1e-3, atol=1e-3 * float(mine.abs().max()))
    down = model._stages.tensors("compress")
    key = next(key for key in down if "layers.1.self_attn.v_proj.lora_A" in key)
    expected = down[key].grad
    torch.testing.assert_close(
        ours.compress.down["_v"].grad[1], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


@pytest.fixture
def language():
    torch.manual_seed(0)
    return Language(SHAPE).double()


@pytest.mark.parametrize("stored", [False, True])
def test_questions_of_a_row_stand_as_if_alone(language, stored):
    """Several questions share a row to save time; none may see another, nor the slots beyond k."""
    prefix, adapted = torch.tensor([1, 2, 3]), language.weights(None)
    slots = torch.randn(1, 5, 128, dtype=torch.float64)
    memory = Memory(slots, None, torch.tensor([3]))
    if stored:
        _, past = language.run(adapted, slots, keep=True)
        memory = Memory(None, past, torch.tensor([3]), 5)
    both = torch.tensor([[10, 11, 12, 20, 21, 22, 23, 0]])
    segment = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])

    def last(tokens: torch.Tensor, segment: torch.Tensor, at: int, memory: Memory) -> torch.Tensor:
        rows = text_rows(tokens, segment, torch.tensor([at]))
        embeds, positions, bias, place = answer_rows(language, prefix, memory, rows)
        out, _ = language.run(adapted, embeds, positions, bias, memory.past)
        return out.flatten(0, 1)[place]

    together = last(both, segment, 6, memory)
    alone = last(both[:, 3:7], segment[:, 3:7], 3, memory)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    if not stored:
        fewer = Memory(slots[:, :3], None, torch.tensor([3]))
        torch.testing.assert_close(last(both, segment, 6, fewer), together, rtol=1e-9, atol=1e-9)


def test_blocks_are_read_as_gguf_writes_them():
    """The weights travel in their published blocks: our reader must agree with the format's own library."""
    if find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    from gguf import GGMLQuantizationType, quants

    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for bits, kind in ((4, GGMLQuantizationType.Q4_1), (8, GGMLQuantizationType.Q8_0)):
        blocks = quants.quantize(values, kind)
        expected = torch.from_numpy(quants.dequantize(blocks, kind))
        assert torch.equal(weights.dequantise(torch.from_numpy(blocks), bits), expected)
