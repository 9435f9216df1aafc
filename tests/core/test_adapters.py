"""Two adapters in one model, through both passes: the traps of PEFT and of gradient checkpointing."""

import copy
from functools import partial

import pytest
import torch
from conftest import SIZE, captions, settings, shake, standard_batch, toy_base
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint

from llava_fwd2bot import add_fwd2bot


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_both_adapters_and_the_summary_tokens_get_gradients(model64):
    """PEFT's set_adapter between the passes would leave the compress adapter without any, and without an error."""
    got = gradients(model64, **standard_batch(model64), **captions())
    wanted = {n for n, p in model64.named_parameters() if p.requires_grad}
    assert set(got) == wanted
    for part in (".compress.", ".answer.", "fwd2bot.tokens", "fwd2bot.logit_scale"):
        assert any(part in n for n in wanted), part
    assert all(g.abs().sum() > 0 for g in got.values())


def test_the_answer_loss_alone_reaches_the_compress_adapter(model64):
    """The bottleneck trains through both passes."""
    got = gradients(model64, **standard_batch(model64))
    assert all(g.abs().sum() > 0 for n, g in got.items() if ".compress." in n)
    assert any(".compress." in n for n in got)


@pytest.mark.parametrize("enable_first", [False, True])
def test_gradient_checkpointing_changes_no_gradient(processor, enable_first):
    """A layer recomputed in backward must run in the stage it ran in forward. Both stages, to the last bit."""
    plain = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(), processor)).train()
    base = toy_base(processor, torch.float64)
    if enable_first:
        base.train()
        base.gradient_checkpointing_enable()
    saved = add_fwd2bot(base, settings(), processor).train()
    saved.load_state_dict(plain.state_dict())
    if not enable_first:
        saved.gradient_checkpointing_enable()
    batch = {**standard_batch(plain), **captions()}
    expected, got = gradients(plain, **batch), gradients(saved, **batch)
    assert saved.is_gradient_checkpointing and expected.keys() == got.keys()
    for part in (".compress.", ".answer."):
        assert max((expected[n] - got[n]).abs().max() for n in got if part in n) == 0
    assert max((expected[n] - got[n]).abs().max() for n in got) == 0


def test_gradient_checkpointing_would_be_wrong_without_the_stage(processor, monkeypatch):
    """The test above can fail: with plain checkpointing the gradients differ."""
    plain = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(), processor)).train()
    expected = gradients(plain, **standard_batch(plain))
    plain.gradient_checkpointing_enable()
    for module in plain.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    got = gradients(plain, **standard_batch(plain))
    assert max((expected[n] - got[n]).abs().max() for n in got if ".compress." in n) > 1e-3


@pytest.mark.parametrize("part", ["model", "model.language_model"])
def test_gradient_checkpointing_turned_on_at_a_submodule_is_safe_too(processor, part):
    """The inner models have the switch as well; by that road the stage must be kept just the same."""
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(), processor)).train()
    expected = gradients(model, **standard_batch(model))
    model.get_submodule(part).gradient_checkpointing_enable()
    got = gradients(model, **standard_batch(model))
    assert max((expected[n] - got[n]).abs().max() for n in got) == 0


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match="non-reentrant"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_deep_copy_has_stages_of_its_own(model64):
    """Checkpointing, backbone and adapters of a copy (a reference model, an average) must not point at the original."""
    model64.train().gradient_checkpointing_enable()
    twin = copy.deepcopy(model64)
    with torch.no_grad():
        for p in twin._stages.parameters():
            p.mul_(2)
    batch = standard_batch(model64)
    before = gradients(model64, **batch)
    gradients(twin, **batch)
    assert all(torch.equal(g, before[n]) for n, g in gradients(model64, **batch).items())
    assert not torch.equal(twin(**batch).loss, model64(**batch).loss)
    assert twin.model.forward.__self__ is twin


def test_an_exception_inside_a_stage_puts_the_stage_back(model):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    handle = model.model.language_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.compress(torch.randn(1, 3, SIZE, SIZE))
    handle.remove()
    assert model._stages.stage == "answer"
    with pytest.raises(RuntimeError, match="boom"), model.fwd2bot_disabled():
        raise RuntimeError("boom")
    assert model._fwd2bot_enabled and model._stages.stage == "answer"


def test_switching_uses_what_peft_reads(model):
    """Private attributes of PEFT: this fails when a release renames them."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    for stage in ("compress", "answer"):
        with model._stages.use(stage):
            assert all(m.active_adapters == [stage] and not m.disable_adapters for m in layers)
    with model._stages.use(None):
        assert all(m.disable_adapters for m in layers)
    with pytest.raises(ValueError, match="stage must be one of"), model._stages.use("other"):
        pass


def test_lora_stays_inside_the_language_model(model):
    """Leaf names such as q_proj also exist in CLIP, so that targets by leaf name would leak into it."""
    names = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    assert len(names) == 2 * 7
    assert all(n.startswith("model.language_model.layers.") for n in names)


def test_everything_else_is_frozen(model):
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or n.startswith("fwd2bot.") for n in trainable)


def test_swapped_adapters_give_another_answer(model):
    """If both stages ran with one adapter nothing else here would notice."""
    batch = standard_batch(model)
    before = model(**batch).loss
    a, b = model._stages.tensors("compress"), model._stages.tensors("answer")
    with torch.no_grad():
        for key in a:
            x = a[key].clone()
            a[key].copy_(b[key])
            b[key].copy_(x)
    assert not torch.allclose(model(**batch).loss, before)


def test_shared_and_none(processor):
    """The paper's ablation: one adapter for both stages, or the language model itself."""
    shared = add_fwd2bot(toy_base(processor), settings(adapters="shared"), processor)
    assert shared._stages.names == ["shared"]
    assert gradients(shared, **standard_batch(shared))
    full = add_fwd2bot(toy_base(processor), settings(adapters="none"), processor)
    got = gradients(full, **standard_batch(full))
    assert "lm_head.weight" in got and not any("lora" in n or "vision_tower" in n for n in got)
    with pytest.raises(ValueError, match="load the base"), full.fwd2bot_disabled():
        pass


def test_unknown_target_names_leave_the_model_as_it_was(processor):
    base = toy_base(processor)
    kind = type(base)
    with pytest.raises(ValueError, match="No layer of LlamaModel is called nonsense"):
        add_fwd2bot(base, settings(lora_targets=["nonsense"]), processor)
    assert type(base) is kind and not hasattr(base, "fwd2bot") and not hasattr(base, "fwd2bot_config")
    assert all(p.requires_grad for p in base.parameters())


def test_half_precision_bases_train_float32_adapters(processor):
    """An update of 1e-5 vanishes on a bfloat16 weight of 1; the base stays as it is."""
    model = shake(add_fwd2bot(toy_base(processor, torch.bfloat16), settings(), processor))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = standard_batch(model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert all(torch.isfinite(g).all() for g in gradients(model, **batch, **captions()).values())


def test_autocast(model):
    """Training with bf16=True keeps float32 weights and runs under autocast."""
    batch = {**standard_batch(model), **captions()}
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert abs(loss - exact) < 0.1 and model._stages.stage == "answer"
