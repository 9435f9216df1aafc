"""What only a GPU can show, on toy hosts: `python -m pytest -m gpu tests/core`, or `bash scripts/gpu_all.sh`.

FWD2BOT_TEST_DEVICE=cpu runs on the CPU what can run there, so that the tests themselves are known to work before a GPU
is at hand. FWD2BOT_TEST_FACTS names a file that takes what was counted, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import captions, settings, shake, standard_batch, toy_base
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlavaForConditionalGeneration

from llava_fwd2bot import add_fwd2bot, load_fwd2bot

DEVICE = torch.device(os.environ.get("FWD2BOT_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() if CUDA else "FWD2BOT_TEST_DEVICE" not in os.environ, reason="there is no GPU"
    ),
]
on_cuda_alone = pytest.mark.skipif(not CUDA, reason="means something on CUDA alone")
# in a training forward; 22 and 29 were counted in the operations of one on the CPU, and the goal is none
MOST_SYNCHRONISATIONS = {"answers": 30, "answers and captions": 40}


@pytest.fixture(autouse=True)
def whole_float32():
    """TF32 would hide an error of 1e-3 behind its own, and is the default of convolutions."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def built(processor, dtype=torch.float32, **changes):
    """The same weights each time, made on the CPU."""
    return shake(add_fwd2bot(toy_base(processor, dtype), settings(**changes), processor))


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def whole_batch(model, device=DEVICE):
    return on(device, {**standard_batch(model), **captions()})


def gradients(model):
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys() and expected
    for name, want in expected.items():
        error, scale = (got[name].float() - want.float()).norm(), want.float().norm()
        assert error <= tolerance * scale + 1e-7, f"{name}: {error / scale:.2e} of its norm"  # NaN fails too


def tell(name: str, value) -> None:
    print(name, value)
    if os.environ.get("FWD2BOT_TEST_FACTS"):
        with open(os.environ["FWD2BOT_TEST_FACTS"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"fact": name, "value": value}) + "\n")


# ---------------------------------------------------------------------- the same as on the CPU
def test_both_stages_equal_the_cpu(processor):
    """Forward and backward of both stages in float32: other kernels, the same method."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = built(processor).to(device)
        batch = whole_batch(model, device)
        with torch.no_grad():
            summary = model.compress(batch["pixel_values"])
            texts = model.embed_text(batch["caption_input_ids"][:2], batch["caption_attention_mask"][:2])
        out = model.train()(**batch)
        out.loss.backward()
        outputs = {"summary": summary, "texts": texts, "logits": out.logits, "loss": out.loss}
        found.append(({n: t.detach().cpu() for n, t in outputs.items()}, gradients(model)))
    (outputs, grads), (gpu_outputs, gpu_grads) = found
    assert {stage for stage in ("compress", "answer") for name in grads if f".{stage}." in name} == {
        "compress",
        "answer",
    }
    assert_close(gpu_outputs, outputs, 1e-4)
    assert_close(gpu_grads, grads, 1e-3)


def test_answers_equal_the_cpu(processor):
    """Greedy tokens from the image and from its summary."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = built(processor).to(device)
        batch = on(device, standard_batch(model, "left"))
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        short = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        stored = model.compress(batch["pixel_values"])
        image = model.generate(**prompt, pixel_values=batch["pixel_values"], **short)
        found.append((image.cpu(), model.generate(**prompt, summary=stored, **short).cpu()))
    assert torch.equal(found[0][0], found[0][1]) and torch.equal(found[1][0], found[1][1])
    assert torch.equal(found[0][0], found[1][0])


# ---------------------------------------------------------------------- training
def test_training_in_bfloat16(processor):
    """Autocast over a bfloat16 base with float32 adapters, as `--bf16` trains: it learns, in both adapters."""
    model = built(processor, torch.bfloat16).to(DEVICE).train()
    batch = whole_batch(model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tell("loss over 8 bfloat16 steps", [round(value, 4) for value in losses])
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[name]) for name, p in trained.items())


def test_gradient_checkpointing_changes_no_gradient(processor):
    """The recomputed compress pass runs in its own stage, also where backward has a thread of its own, as on CUDA."""
    found = []
    for checkpointing in (False, True):
        model = built(processor).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**whole_batch(model)).loss.backward()
        found.append(gradients(model))
    assert_close(found[1], found[0], 1e-4)


def test_chunks_change_no_gradient(processor):
    """Summaries recomputed chunk by chunk (GradCache) on the device's own backward thread."""
    found = []
    for chunk in (None, 1):
        model = built(processor, contrastive_chunk=chunk).to(DEVICE).train()
        model(**whole_batch(model)).loss.backward()
        found.append(gradients(model))
    assert_close(found[1], found[0], 1e-4)


# ---------------------------------------------------------------------- kernels
def test_no_attention_mask_is_made_and_flash_attention_takes_every_pass(processor, monkeypatch):
    """A mask in memory would cost T² and rule out the fast kernels; here nothing but flash attention may run."""
    masks, kept = [], torch.nn.functional.scaled_dot_product_attention

    def seen(query, *args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        assert query.dtype == torch.bfloat16  # flash attention knows no float32, on CUDA
        return kept(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    base = toy_base(processor, torch.bfloat16)
    base.set_attn_implementation("sdpa")
    model = shake(add_fwd2bot(base, settings(), processor)).to(DEVICE).train()
    batch = on(DEVICE, {**standard_batch(model, "right"), **captions()})
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            model.compress(batch["pixel_values"])
        passes = len(masks)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            model(**batch).loss.backward()
    assert passes == 4 and len(masks) > 8  # two layers of the tower, two of the language model; then all three passes
    assert all(mask is None for mask in masks)


@on_cuda_alone
@pytest.mark.parametrize("rows", MOST_SYNCHRONISATIONS)
def test_synchronisations_of_a_training_forward(processor, rows):
    """Each makes the GPU wait for the CPU. The number is told; what is asserted is that it does not grow."""
    model = built(processor).to(DEVICE).train()
    batch = on(DEVICE, {**standard_batch(model, "right"), **(captions() if "captions" in rows else {})})
    model(**batch, return_logits=False).loss.backward()  # loads modules, makes handles
    torch.cuda.synchronize()
    counts = {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = model(**batch, return_logits=False).loss
            counts["forward"] = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
            loss.backward()
            counts["backward"] = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
            counts["backward"] -= counts["forward"]
            places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tell(f"synchronisations of a training step, {rows}", counts)
    tell(f"where they are, {rows}", places)
    assert 0 < counts["forward"] <= MOST_SYNCHRONISATIONS[rows]


# ---------------------------------------------------------------------- 4 and 8 bits
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(base_dir, processor, tmp_path, bits):
    """QLoRA on the GPU's own kernels: gradients in both adapters, and an answer."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = shake(add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(base_dir), settings(), processor))
    model.save_pretrained(tmp_path / "m", processor=processor)
    width = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    model = load_fwd2bot(tmp_path / "m", device_map={"": DEVICE.type}, **width)[0].train()
    model(**whole_batch(model)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())
    assert {s for s in ("compress", "answer") for n in trained if f".{s}." in n} == {"compress", "answer"}
    batch = on(DEVICE, standard_batch(model, "left"))
    batch.pop("labels")
    out = model.eval().generate(**batch, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1]


# ---------------------------------------------------------------------- as graphs
def test_static_cache(processor):
    """Keys and values at fixed places in memory, as CUDA graphs need them: the same tokens."""
    model = built(processor).to(DEVICE)
    batch = on(DEVICE, standard_batch(model, "left"))
    batch.pop("labels")
    short = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **short)
    got = model.generate(**batch, **short, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, expected)


@on_cuda_alone
def test_the_passes_as_cuda_graphs(processor):
    """The decoder in each stage, captured once and replayed on other rows: what it gives without a graph."""
    model = built(processor).to(DEVICE)
    decoder = model.model.language_model
    rows = torch.randn(2, 24, 64, device=DEVICE)
    for stage in ("compress", "answer"):
        with torch.no_grad(), model._stages.use(stage):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    decoder(inputs_embeds=rows, use_cache=False)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = decoder(inputs_embeds=rows, use_cache=False).last_hidden_state
            rows.copy_(torch.randn(2, 24, 64, device=DEVICE))
            graph.replay()
            expected = decoder(inputs_embeds=rows, use_cache=False).last_hidden_state
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- one process of many
@contextmanager
def group(tmp_path: Path):
    """A process group of this process alone."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    if CUDA:
        torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl" if CUDA else "gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_with_one_process(processor, tmp_path):
    """DistributedDataParallel over NCCL: the gradients of the bare model, twice in a row."""
    model = built(processor).to(DEVICE).train()
    batch = whole_batch(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    with group(tmp_path):
        parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0] if CUDA else None)
        for _ in range(2):
            model.zero_grad()
            parallel(**batch).loss.backward()
            assert_close(gradients(model), expected, 1e-4)
        del parallel


def test_fully_sharded_with_one_process(processor, tmp_path):
    """FSDP2 with a unit for each decoder layer, which both passes go through: the gradients of the bare model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = built(processor).to(DEVICE).train()
    batch = whole_batch(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with group(tmp_path):
        mesh = init_device_mesh(DEVICE.type, (1,))
        scalars = {p for p in model.parameters() if p.dim() == 0}  # which FSDP2 refuses
        tell("parameters without a dimension", len(scalars))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=scalars)
        model(**batch).loss.backward()
        got = {
            name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().cpu()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    assert_close(got, expected, 1e-4)


# ---------------------------------------------------------------------- compiled, which takes longest
def test_compiled_language_model(processor):
    """torch.compile of the decoder: each stage gets code of its own, and says what it says uncompiled."""
    model = built(processor).to(DEVICE).train()
    batch = whole_batch(model)
    out = model(**batch)
    out.loss.backward()
    expected = {"logits": out.logits.detach().cpu(), "loss": out.loss.detach().cpu()}
    grads = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    model.model.language_model.compile(backend="inductor" if CUDA else "eager", dynamic=True)
    try:
        out = model(**batch)
        out.loss.backward()
    finally:
        torch.compiler.reset()
    assert_close({"logits": out.logits.detach().cpu(), "loss": out.loss.detach().cpu()}, expected, 1e-3)
    assert_close(gradients(model), grads, 1e-2)


@on_cuda_alone
def test_generate_compiled_with_a_static_cache(processor):
    """`cache_implementation="static"` as it comes: generate compiles the decoding step into CUDA graphs."""
    model = built(processor).to(DEVICE)
    batch = on(DEVICE, standard_batch(model, "left"))
    batch.pop("labels")
    short = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **short)
    try:
        got = model.generate(**batch, **short, cache_implementation="static")
    finally:
        torch.compiler.reset()
    assert torch.equal(got, expected)
