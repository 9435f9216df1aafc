"""What runs, and how often: nothing is computed twice that need not be."""

import pytest
import torch
from conftest import captions, settings, shake, standard_batch, toy_base
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from llava_fwd2bot import add_fwd2bot, load_fwd2bot


def calls(layer):
    """Rows that go through a layer, one entry a call, those of a recomputation as well."""
    found = []
    layer.self_attn.q_proj.register_forward_pre_hook(
        lambda m, args, kwargs: found.append(args[0].shape[0]), with_kwargs=True
    )
    return found


def fresh(processor, **changes):
    torch.manual_seed(0)
    return shake(add_fwd2bot(toy_base(processor), settings(**changes), processor)).train()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("projector", [False, True])
def test_the_frozen_vision_tower_runs_once(processor, before, projector):
    """Trainers ask for input gradients along with checkpointing; that hooks the tower's embeddings as well."""
    base = toy_base(processor)
    if before:  # as LLaVA's own script does
        base.enable_input_require_grads()
    model = shake(add_fwd2bot(base, settings(), processor, train_projector=projector)).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    tower = model.model.vision_tower
    tower = calls(getattr(tower, "vision_model", tower).encoder.layers[0])
    model(**standard_batch(model), **captions()).loss.backward()
    assert len(tower) == 1
    trained = [*model._stages.parameters(), model.fwd2bot.tokens]
    trained += list(model.trained_projector().parameters()) if projector else []
    assert all(p.grad is not None for p in trained)
    model.disable_input_require_grads()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_run_the_compress_pass_twice(processor, checkpointing):
    """Once forward and once in backward; with checkpointing of layers as well it ran a third time."""
    model = fresh(processor, contrastive_chunk=1)
    if checkpointing:
        model.gradient_checkpointing_enable()
    layer = calls(model.model.language_model.layers[0])
    batch = standard_batch(model)
    batch["labels"][:] = -100
    out = model(**batch, **captions())
    once = sum(layer)
    assert once == 3 + 2  # images and captions
    out.loss.backward()
    assert sum(layer) == 2 * once


def test_the_tower_runs_in_the_chunks(processor):
    """The dense tokens of 8,192 images of LLaVA-1.5-7B are 39 GB: each chunk makes its own, in backward as well."""
    model = fresh(processor, contrastive_chunk=1)
    tower = model.model.vision_tower
    tower = calls(getattr(tower, "vision_model", tower).encoder.layers[0])
    batch = standard_batch(model)
    batch["labels"][:] = -100
    model(**batch, **captions()).loss.backward()
    assert tower == [1] * 6  # three images, forward and backward


def test_checkpointing_without_chunks_goes_on(processor):
    model = fresh(processor)
    model.gradient_checkpointing_enable()
    layer = calls(model.model.language_model.layers[0])
    out = model(**standard_batch(model), **captions())
    once = len(layer)
    out.loss.backward()
    assert len(layer) == 2 * once == 6


class _Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.casts += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def casts_of_a_step(model):
    cache = {}
    ids = torch.tensor([[1, 300, 301]])
    with torch.no_grad():
        name = getattr(type(model), "past_name", "past_key_values")
        out = model(input_ids=ids, use_cache=True, **cache)
        past = getattr(out, name, None) or out.past_key_values
        with _Counts() as counts:
            model(input_ids=ids[:, -1:], **{name: past}, use_cache=True)
    return counts.casts


def test_adapters_come_in_the_dtype_of_the_base(on_disk, processor, base_dir, tmp_path):
    """A float32 adapter on a bfloat16 base casts its input and its output, in every layer, for every token."""
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    model, _ = load_fwd2bot(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in model._stages.parameters()} == {torch.bfloat16}
    assert model.fwd2bot.tokens.dtype == torch.float32
    with model.fwd2bot_disabled():
        base = casts_of_a_step(model)
    assert casts_of_a_step(model) == base
    kept, _ = load_fwd2bot(tmp_path / "m", dtype=torch.bfloat16, trainable=True)
    for name in kept._stages.names:
        for key, parameter in kept._stages.tensors(name).items():
            assert torch.equal(parameter, on_disk._stages.tensors(name)[key])
    assert casts_of_a_step(kept) > base


def test_training_on_is_refused_in_half_precision(on_disk, processor, tmp_path):
    from llava_fwd2bot import Fwd2BotTrainer, Fwd2BotTrainingArguments

    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    model, _ = load_fwd2bot(tmp_path / "m", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="half precision.*trainable=True"):
        Fwd2BotTrainer(model=model, args=Fwd2BotTrainingArguments(tmp_path / "out", report_to="none"))


def step_in_half_precision(model, batch):
    """Bytes saved for backward under autocast, the loss, and the gradients."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved, sizes = [], []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            saved.append(tensor)
            sizes.append(storage.nbytes())
        return tensor

    model.zero_grad()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, return_logits=False).loss
    loss.backward()
    return sum(sizes), loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_adapters_keep_no_copies_of_their_input(processor):
    """PEFT's cast to float32, which autocast rounds back, left a copy for each of q, k, v, gate, up. Same numbers."""
    model = add_fwd2bot(toy_base(processor, torch.bfloat16), settings(), processor)
    model = shake(model).train()
    batch = {**standard_batch(model, "right"), **captions()}
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    size, loss, gradients = step_in_half_precision(model, batch)
    for layer in model._stages.layers.values():
        del layer._cast_input_dtype  # PEFT's own
    before, expected, wanted = step_in_half_precision(model, batch)
    assert torch.equal(loss, expected) and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    assert size <= 0.9 * before


def test_dropout_keeps_the_float32_input(processor):
    """In half precision its scale, 1 / (1 - p), would be rounded."""
    model = add_fwd2bot(toy_base(processor, torch.bfloat16), settings(lora_dropout=0.1), processor)
    assert all("_cast_input_dtype" not in vars(layer) for layer in model._stages.layers.values())


@pytest.mark.parametrize(("autocast", "given"), [(True, torch.bfloat16), (False, torch.float32)])
def test_without_autocast_the_adapters_input_is_float32(processor, autocast, given):
    """There a product of bfloat16 and float32 is an error."""
    model = shake(add_fwd2bot(toy_base(processor, torch.bfloat16), settings(), processor))
    found = []
    layer = model.model.language_model.layers[0].mlp.up_proj.lora_A["answer"]
    layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=torch.tensor([[1, 300, 301]]))
    assert found == [given]


def test_a_decode_step_with_a_static_cache_is_one_graph(model):
    """How much a static cache holds is known on the device alone: asking for it breaks the graph."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    past = {type(model).past_name: cache}
    ids = torch.tensor([[1, 300, 301, 302]])
    positions = torch.arange(4)[None]
    with torch.no_grad():
        model(input_ids=ids[:, :3], position_ids=positions[:, :3], **past)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        step = compiled(input_ids=ids[:, 3:], position_ids=positions[:, 3:], **past)
        expected = model(input_ids=ids).logits[:, -1:]
    torch.testing.assert_close(step.logits, expected, rtol=1e-4, atol=1e-4)


def test_static_generation_is_compiled_and_says_the_same(model):
    from transformers import CompileConfig

    batch = standard_batch(model, "left")
    batch.pop("labels")
    given = {"max_new_tokens": 4, "do_sample": False}
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    static = model.generate(**batch, **given, cache_implementation="static", compile_config=config)
    assert torch.equal(static, model.generate(**batch, **given))


def test_placeholders_without_an_image_are_an_error_still(model):
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 5]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="0 image.s. were given"):
            call(input_ids=ids)
