"""The core modules over a bare Llama: they know no host; from transformers 4.37.2 with PEFT 0.10 to the newest.

Needs neither conftest nor LLaVA, so that it also runs where the original LLaVA's versions are installed.
"""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from llava_fwd2bot.compressors import has_prefixes
from llava_fwd2bot.compressors.averages import nested_averages
from llava_fwd2bot.config import Fwd2BotConfig
from llava_fwd2bot.mixin import Fwd2BotMixin

IMAGE, DENSE, K = 63, 5, 3
CELLS = torch.tensor([[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]])  # K of DENSE


class ToyHost(Fwd2BotMixin, LlamaForCausalLM):
    """An image is five rows of eight numbers; the projector is one matrix."""

    base_class = LlamaForCausalLM

    def _language_model(self):
        return self.model

    def _dense_tokens(self, pixel_values):
        return list(self.projector(pixel_values))

    def _image_token_id(self):
        return IMAGE

    def _projector_slot(self):
        return self, "projector"


@pytest.fixture(params=["none", "average", "pool"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    host = LlamaForCausalLM(config).double().eval()
    host.projector = nn.Linear(8, 32).double()
    host.__class__ = ToyHost
    settings = Fwd2BotConfig(num_summary_tokens=K, lora_r=4, lora_alpha=8, residual=request.param)
    host._init_fwd2bot(settings, image_prompt_ids=[7, 8], text_prompt_ids=[9])
    with torch.no_grad():
        for parameter in host._stages.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return host


def batch():
    rows = [[0, 0, 1, *[IMAGE] * DENSE, 11, 12], [1, *[IMAGE] * DENSE, 13, 14, 15, 2]]
    ids = torch.tensor(rows)
    labels = torch.where(ids >= 12, ids, -100).masked_fill(ids == IMAGE, -100)
    pixels = torch.randn(2, DENSE, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels, "labels": labels}


def gradients(model, **more):
    model.zero_grad()
    captions = torch.tensor([[1, 20, 21], [1, 22, 0]])
    model(**batch(), caption_input_ids=captions, caption_attention_mask=(captions > 0).long(), **more).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_both_passes_against_the_method_written_out(model):
    words, given = model.get_input_embeddings(), batch()
    expected = []
    for ids, labels, pixels in zip(given["input_ids"], given["labels"], given["pixel_values"]):  # noqa: B905
        with model._stages.use("compress"):
            dense, residual = model.projector(pixels), model.fwd2bot_config.residual
            added = {
                "none": torch.zeros(K, 32, dtype=torch.float64),
                "average": nested_averages(DENSE, K).double() @ dense,
                "pool": CELLS.double() @ dense,
            }[residual]
            gain = 1.0 if residual == "none" else model.fwd2bot.log_gain.exp()
            row = torch.cat([dense, words(torch.tensor([7, 8])), model.fwd2bot.tokens + added])
            summary = added + gain * model.model(inputs_embeds=row[None]).last_hidden_state[0, -K:]
        real = ids[ids > 0]
        first = int((real == IMAGE).nonzero()[0])
        row = torch.cat([words(real[:first]), summary, words(real[first + DENSE :])])
        hidden = model.model(inputs_embeds=row[None]).last_hidden_state[0]
        targets = torch.cat([torch.full((first + K,), -100), labels[ids > 0][first + DENSE :]])[1:]
        expected.append(cross_entropy(model.lm_head(hidden[:-1]), targets, reduction="sum"))
    labelled = (given["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(model(**given).answer_loss, sum(expected) / labelled, rtol=0, atol=1e-10)


def test_gradient_checkpointing_changes_no_gradient(model):
    expected = gradients(model.train())
    assert any(".compress." in n for n in expected) and any(".answer." in n for n in expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert max((expected[n] - got[n]).abs().max() for n in got) == 0
    if transformers.__version__ >= "5":  # before, re-entrant is what transformers asks for when nobody did
        with pytest.raises(ValueError, match="non-reentrant"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    else:
        model.gradient_checkpointing_enable()
        assert all(torch.equal(expected[n], g) for n, g in gradients(model).items())


def test_chunks_change_no_gradient(model):
    expected = gradients(model.train())
    model.fwd2bot_config.contrastive_chunk = 1
    got = gradients(model)
    assert max((expected[n] - got[n]).abs().max() for n in expected) <= 1e-10


def test_prefix_and_generation_from_stored_summaries(model):
    given = batch()
    given.pop("labels")
    model.float()  # the masks of 4.37.2 cannot be made in float64
    pixels = given.pop("pixel_values").float()
    summary = model.compress(pixels)
    if has_prefixes(model.fwd2bot_config):
        torch.testing.assert_close(model.compress(pixels, num_tokens=2), summary[:, :2], rtol=0, atol=1e-6)
    else:
        assert not torch.allclose(model.compress(pixels, num_tokens=2), summary[:, :2], rtol=0, atol=1e-2)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    a = model.generate(**given, pixel_values=pixels, **options)
    b = model.generate(**given, summary=summary, **options)
    assert torch.equal(a, b)
    assert torch.equal(a[:, : given["input_ids"].shape[1]], given["input_ids"])


def test_disabled_is_the_base(model):
    ids = torch.tensor([[1, 4, 5, 6]])
    with_adapters = model(input_ids=ids).logits
    with model.fwd2bot_disabled():
        ours = model(input_ids=ids).logits
    for layer in model._stages.layers.values():
        for side in (layer.lora_A, layer.lora_B):
            for linear in side.values():
                nn.init.zeros_(linear.weight)
    assert torch.equal(ours, model(input_ids=ids).logits)
    assert not torch.equal(ours, with_adapters)


def test_embeddings(model):
    images = model.embed_image(batch()["pixel_values"])
    texts = model.embed_text(torch.tensor([[1, 20, 21]]))
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=-1), torch.ones(3, dtype=torch.float64))
