"""`load_fwd2bot(..., merge=stage)`: one stage at the base's own cost, and nothing else by mistake."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SIZE, settings, shake, standard_batch, toy_base
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration

from llava_fwd2bot import add_fwd2bot, load_fwd2bot

PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
NEW = {"max_new_tokens": 8, "do_sample": False}


def stored(model, **more):
    batch = standard_batch(model, "left")
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | more


@pytest.fixture
def saved(on_disk, processor, tmp_path):
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    return tmp_path / "m"


def test_merged_is_the_stage(saved):
    """Exact mathematics in float64, for each stage."""
    whole, _ = load_fwd2bot(saved, dtype=torch.float64)
    summary = whole.compress(PIXELS)
    merged, _ = load_fwd2bot(saved, dtype=torch.float64, merge="compress")
    torch.testing.assert_close(merged.compress(PIXELS), summary, rtol=1e-10, atol=1e-10)
    ids = torch.tensor([[300, 301, 302]])
    torch.testing.assert_close(merged.embed_text(ids), whole.embed_text(ids), rtol=1e-10, atol=1e-10)
    merged, _ = load_fwd2bot(saved, dtype=torch.float64, merge="answer")
    given = stored(whole, summary=torch.cat([summary, summary[:1]]))
    assert torch.equal(merged.generate(**given, **NEW), whole.generate(**given, **NEW))
    torch.testing.assert_close(merged(**given).logits, whole(**given).logits, rtol=1e-10, atol=1e-10)
    base = LlavaForConditionalGeneration.from_pretrained(whole.name_or_path)
    text = torch.tensor([[1, 300, 301]])
    assert not torch.allclose(merged(input_ids=text).logits, base.double()(input_ids=text).logits)


def test_the_other_stage_and_the_base_are_refused(saved):
    """Their weights are gone: an answer by the wrong ones would look like any other."""
    merged, _ = load_fwd2bot(saved, merge="answer")
    pixels = PIXELS.float()
    for use in (
        lambda: merged.compress(pixels),
        lambda: merged.embed_image(pixels),
        lambda: merged.embed_text(torch.tensor([[300]])),
        lambda: merged.generate(**stored(merged, pixel_values=standard_batch(merged)["pixel_values"]), **NEW),
    ):
        with pytest.raises(ValueError, match='merge="answer".*this needs the "compress" stage: open the checkpoint'):
            use()
    with pytest.raises(ValueError, match="this needs the base's own weights"), merged.fwd2bot_disabled():
        pass
    assert merged._fwd2bot_enabled
    merged.embed_image(summary=torch.randn(1, 4, 64))  # no language model in it

    merged, _ = load_fwd2bot(saved, merge="compress")
    summary = merged.compress(pixels)
    text = torch.tensor([[1, 300, 301]])
    for use in (
        lambda: merged.generate(**stored(merged, summary=torch.cat([summary, summary[:1]])), **NEW),
        lambda: merged.generate(text, **NEW),
        lambda: merged(input_ids=text),
        lambda: copy.deepcopy(merged)(input_ids=text),
    ):
        with pytest.raises(ValueError, match='merge="compress".*this needs the "answer" stage'):
            use()


def test_what_cannot_be_merged_is_refused_before_the_base_is_loaded(saved, processor, tmp_path, monkeypatch):
    full = add_fwd2bot(toy_base(processor), settings(adapters="none"), processor)
    full.name_or_path = ""
    full.save_pretrained(tmp_path / "full", processor=processor)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(ValueError, match="merge must be one of compress, answer, got 'both'"):
        load_fwd2bot(saved, merge="both")
    with pytest.raises(ValueError, match="a merged adapter cannot be trained"):
        load_fwd2bot(saved, merge="answer", trainable=True)
    with pytest.raises(ValueError, match="nothing to merge"):
        load_fwd2bot(tmp_path / "full", merge="answer")
    pytest.importorskip("bitsandbytes")
    for width in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ValueError, match="needs a float base: merging into quantised weights"):
            load_fwd2bot(saved, merge="answer", **{width: True})


def test_a_base_that_is_quantised_by_itself_is_refused(model):
    """Its configuration says so, not ours."""
    layer = model.model.language_model.layers[1].self_attn.q_proj.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    before = model.model.language_model.layers[0].self_attn.q_proj.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="The base is quantised .*layers.1.self_attn.q_proj is torch.int8"):
        model._merge_adapter("answer")
    after = model.model.language_model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert torch.equal(before, after) and model._stages.names == ["compress", "answer"]


def test_merged_is_neither_saved_nor_trained(saved, tmp_path):
    """A checkpoint without adapters, or a run that trains nothing, would be noticed too late."""
    merged, _ = load_fwd2bot(saved, merge="answer")
    with pytest.raises(ValueError, match="cannot be written apart"):
        merged.save_pretrained(tmp_path / "n")
    assert not (tmp_path / "n").exists()
    with pytest.raises(ValueError, match="cannot be trained"):
        merged.train()


def test_a_shared_adapter_serves_both_stages(base_dir, processor, tmp_path):
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    model = shake(add_fwd2bot(base, settings(adapters="shared"), processor)).eval()
    model.save_pretrained(tmp_path / "m", processor=processor)
    batch = {name: value for name, value in standard_batch(model, "left").items() if name != "labels"}
    expected = model.generate(**batch, **NEW)
    for stage in ("answer", "compress"):
        merged, _ = load_fwd2bot(tmp_path / "m", merge=stage)
        assert torch.equal(merged.generate(**batch, **NEW), expected)


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model):
    """The operations of one decode step, in order."""
    ids = torch.tensor([[1, 300, 301]])
    name = getattr(type(model), "past_name", "past_key_values")
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        past = getattr(out, name, None) or out.past_key_values
        with _Operations() as found:
            model(input_ids=ids[:, -1:], **{name: past}, use_cache=True)
    return found.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_step_is_the_bases_own(saved, base_dir, dtype):
    """That is what merging is for."""
    whole, _ = load_fwd2bot(saved, dtype=dtype)
    merged, _ = load_fwd2bot(saved, dtype=dtype, merge="answer")
    with whole.fwd2bot_disabled():
        base = operations_of_a_step(whole)
    assert operations_of_a_step(merged) == base
    assert len(operations_of_a_step(whole)) > len(base)
    assert {p.dtype for p in merged.model.language_model.parameters()} == {dtype}
    names = {name for name, _ in LlavaForConditionalGeneration.from_pretrained(base_dir).named_parameters()}
    assert {name for name, _ in merged.named_parameters() if not name.startswith("fwd2bot.")} == names


def test_half_precision_is_rounded_once(saved):
    """Adapters rounded first, then the product, then the sum would lose digits that the file has."""
    base, _ = load_fwd2bot(saved, dtype=torch.bfloat16)
    merged, _ = load_fwd2bot(saved, dtype=torch.bfloat16, merge="answer")
    name = "layers.0.mlp.up_proj.weight"
    weight = base._language_model().get_parameter(name.replace("weight", "base_layer.weight")).double()
    full, _ = load_fwd2bot(saved, dtype=torch.float64)
    delta = full._language_model().layers[0].mlp.up_proj.get_delta_weight("answer").detach()
    found = merged._language_model().get_parameter(name)
    assert ((found.double() - (weight + delta)).abs() <= (weight + delta).abs() * 2**-8).all()


def test_a_static_cache_says_the_same(saved):
    """What CUDA graphs need: keys and values in memory of a fixed size."""
    for merge in (None, "answer"):
        model, _ = load_fwd2bot(saved, merge=merge)
        generator = torch.Generator().manual_seed(0)
        given = stored(model, summary=torch.randn(3, 4, 64, generator=generator))
        expected = model.generate(**given, **NEW)
        assert torch.equal(model.generate(**given, **NEW, cache_implementation="static"), expected)


def test_a_compressor_without_a_language_model_has_one_stage_to_merge_and_export(base_dir, processor, tmp_path):
    """Its summaries need no adapter, so they are there with the answer's merged; and nothing is exported for them."""
    from llava_fwd2bot.checkpoint.export import export
    from llava_fwd2bot.checkpoint.export_manifest import read_manifest

    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    model = shake(add_fwd2bot(base, settings(compressor="pool", contrastive_weight=0), processor)).eval()
    model.save_pretrained(tmp_path / "m", processor=processor)
    merged, _ = load_fwd2bot(tmp_path / "m", merge="answer")
    pixels = PIXELS.float()
    assert torch.equal(merged.compress(pixels), model.compress(pixels))
    with pytest.raises(ValueError, match='no adapter "compress" to merge'):
        load_fwd2bot(tmp_path / "m", merge="compress")
    for to in ("vllm", "peft"):
        assert read_manifest(export(tmp_path / "m", to, tmp_path / to))["stages"] == ["answer"]
        with pytest.raises(ValueError, match="has no adapter 'compress'"):
            export(tmp_path / "m", to, tmp_path / "x", stage="compress")
