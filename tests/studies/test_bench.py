"""The benchmarks run at a toy's size and report what they promise. Times are not judged: others use this machine."""

from __future__ import annotations

import json
import math
import platform

import pytest
import torch
from PIL import Image

from eval.measure import PeakMemory


@pytest.fixture
def bench(import_script, capsys, tmp_path):
    """Runs a benchmark's main in this process: what it returns, the last line it prints, and the file it writes."""
    threads = torch.get_num_threads()

    def run(name: str, *argv: str) -> tuple[dict, dict, dict]:
        module = import_script(name)
        output = tmp_path / "bench.json"
        argv = ("--shape", "tiny", "--device", "cpu", "--json", "--output", str(output), *argv)
        result = module.main(list(argv))
        return result, json.loads(capsys.readouterr().out.splitlines()[-1]), json.loads(output.read_text())

    yield run
    torch.set_num_threads(threads)


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_training_step(bench):
    result, line, file = bench("bench_train", "--k", "4", "--steps", "2", "--batch", "2", "--contrastive")
    assert result == line == file
    for name in ("step_time_ratio", "peak_memory_ratio", "times", "shares", "environment", "operations_ratio"):
        assert name in result
    assert (result["shape"], result["k"], result["n"]) == ("tiny", 4, 36)
    assert result["tokens"]["host"] == 36 + result["tokens"]["text"]
    assert set(result["times"]) == {"host", "fwd2bot", "fwd2bot_contrastive"} == set(result["memory"])
    assert all(math.isfinite(number) and number > 0 for number in numbers(result))
    # two adapters and R, the temperature; nothing else trains, and on the host one adapter alone
    trains = result["trainable"]
    assert trains["fwd2bot"] == 2 * trains["host"] + 4 * result["sizes"]["hidden"] + 1


def test_gradient_checkpointing(bench):
    result, _, _ = bench("bench_train", "--k", "4", "--steps", "1", "--gradient-checkpointing")
    assert result["gradient_checkpointing"] and result["step_time_ratio"] > 0
    assert result["tokens"]["caption"] == 0 and "fwd2bot_contrastive" not in result["times"]


def test_batches_that_do_not_fit(bench, monkeypatch):
    """On a GPU: checkpointing where only that fits; what does not fit at all is named, and all before it stays."""
    from bench_train import _of_batch

    tried = []

    def scarce(batch, models, memory, options, *rest):
        tried.append((batch, options.gradient_checkpointing))
        if batch == 8 or (batch == 2 and not options.gradient_checkpointing):
            raise torch.cuda.OutOfMemoryError("out of memory")
        return _of_batch(batch, models, memory, options, *rest)

    monkeypatch.setattr("bench_train._of_batch", scarce)
    batches = ("--batch", "1", "2", "8", "16", "--fit", "--memory", "beside")
    result, _, _ = bench("bench_train", "--k", "4", "--steps", "1", *batches)
    assert tried == [(1, False), (2, False), (2, True), (8, False), (8, True)]
    found = result["by_batch"]
    assert {batch: of["gradient_checkpointing"] for batch, of in found.items()} == {"1": False, "2": True}
    assert result["left_out"] == ["batch 8: out of memory", "batch 16: out of memory"]
    assert result["times"] == found["1"]["times"] and result["batch"] == 1
    assert found["2"]["operations"]["host"] > 2 * found["1"]["operations"]["host"]  # recomputed ones count


def test_no_time_is_left(bench):
    """What the time does not reach is named; a run that measured nothing is no success."""
    with pytest.raises(SystemExit, match="batch 1: out of time"):
        bench("bench_train", "--k", "4", "--steps", "1", "--memory", "beside", "--seconds", "0")


def test_what_a_forward_saves_for_backward(bench):
    """More rows save more, under autocast; the sum is at least that of the largest lines."""
    sizes = []
    for batch in ("1", "2"):
        result, line, file = bench("measure_saved", "--k", "4", "--dtype", "bfloat16", "--batch", batch)
        assert result == line == file
        found = result["fwd2bot"]
        assert sum(found["largest"].values()) <= found["bytes"] <= 1.5 * sum(found["largest"].values())
        assert any("lora" in origin for origin in found["largest"])
        assert result["ratio"] == found["bytes"] / result["host"]["bytes"]
        sizes.append(found["bytes"])
    assert 1.8 * sizes[0] < sizes[1] < 2.1 * sizes[0]


def test_inference(bench):
    result, line, file = bench("bench_infer", "--k", "4", "2", "--rounds", "2", "--new-tokens", "3", "--merged")
    assert result == line == file
    for name in ("ttft_ratio", "ttft_ratio_image_over_cached", "ttft_ms", "tokens_per_second", "environment", "shares"):
        assert name in result
    assert set(result["by_k"]) == {"4", "2"}
    assert set(result["by_k"]["4"]["compress_ms_per_image"]) == {"1", "8"}
    assert set(result["ttft_ms"]) - set(result["tokens_per_second"]) == {"words, k = 4", "words, k = 2"}
    assert {"ttft_ratio_base_over_words", "ttft_ratio_merged", "processor_time_ratio"} <= set(result["by_k"]["2"])
    size = result["by_k"]["4"]["bytes_per_image"]
    assert size["summary"] * 9 == size["dense"] and size["kv_of_summary"] * 9 == size["kv_of_dense"]
    assert all(math.isfinite(number) and number > 0 for number in numbers(result))


def test_counted_operations_and_bytes_are_those_of_the_model(import_script):
    """What achieved figures are made of: weights as the model has them, operations as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    common = import_script("bench_common")
    shape, k = common.SHAPES["tiny"], 4
    model = common.with_fwd2bot(common.build(shape, torch.device("cpu"), torch.float32), k, 4)
    layers = model.model.language_model.layers
    assert shape.adapter_weights(4) == sum(p.numel() for n, p in layers.named_parameters() if ".compress." in n)
    matrices = [p.numel() for n, p in layers.named_parameters() if p.dim() == 2 and ".lora_" not in n]
    assert shape.layer_weights == sum(matrices)
    assert shape.head_weights == model.lm_head.weight.numel()
    layers = [p for n, p in model.model.vision_tower.named_parameters() if "encoder.layers" in n]
    assert shape.tower_weights == sum(p.numel() for p in layers if p.dim() == 2)
    model.eval().set_attn_implementation("sdpa")
    pixels = torch.randn(1, 3, shape.image_size, shape.image_size)
    with torch.no_grad(), model._stages.use(None), FlopCounterMode(display=False) as counter:
        hidden = model._dense_tokens(pixel_values=pixels)
        model._language_model()(inputs_embeds=hidden[0][None], use_cache=False)
    n = shape.dense_tokens
    counted = shape.compress_operations(k) - shape._layers(n + 10 + k) + shape._layers(n)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)  # the projector, patches, and masked halves


def test_toy_keeps_the_proportions_of_7b(import_script):
    """Its head above all: a toy with a wide head would flatter a method that skips logits."""
    shapes = import_script("bench_shapes").SHAPES
    toy, full = (shapes[name].shares(200) for name in ("toy", "7b"))
    assert toy["head_of_language_model"] <= full["head_of_language_model"] * 1.05
    assert abs(toy["vision_tower"] - full["vision_tower"]) < 0.01
    assert shapes["toy"].dense_tokens == shapes["7b"].dense_tokens == 576


def test_twin_shares_weights_but_no_adapters(import_script):
    common = import_script("bench_common")
    base = common.build(common.SHAPES["tiny"], torch.device("cpu"), torch.float32)
    names = dict(base.named_parameters())
    model = common.with_fwd2bot(common.twin(base), 4, 4)
    assert not hasattr(base, "fwd2bot") and not any("lora" in name for name in dict(base.named_parameters()))
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(kept[name] is parameter for name, parameter in names.items())


def test_what_a_cache_costs(on_disk, processor, tmp_path, import_script):
    """The script that states the cost of a cache fills one for real, in every round."""
    pytest.importorskip("lancedb")
    bench_fill = import_script("bench_fill")
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    for i in range(3):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    found = bench_fill.measure(str(tmp_path / "m"), [str(tmp_path)], "int4", rounds=2, batch_size=2)
    assert found["images"] == 3 and all(len(rounds) == 2 for rounds in found["seconds"].values())
    assert all(math.isfinite(x) and x > 0 for x in numbers(found["fill_over_model"]))


def test_memory_that_was_freed_before_counts_where_it_is_used_again():
    """The allocator keeps it, and serves the next step with it: bench_cost.py said that compressing takes 0 MB."""
    memory, found = PeakMemory(torch.device("cpu")), []
    # 64 MiB in parts too small for pages of their own
    for _ in range(2):
        memory.reset()
        before, parts = memory.now(), [torch.ones(2**14) for _ in range(2**10)]
        del parts
        found.append(memory.peak() - before)
    if not memory.exact or platform.libc_ver()[0] != "glibc":
        pytest.skip("this system cannot tell what a part of a process needs")
    assert found == pytest.approx([2**26] * 2, rel=0.25)


def test_memory_by_pairs(bench, monkeypatch):
    """Chunks bound what a batch needs: sixteen times the pairs take little more than the pooled vectors."""
    module = __import__("bench_pairs")
    monkeypatch.setattr(module, "_in_own_process", lambda pairs, options: measured(module, pairs))
    monkeypatch.setattr("llava_fwd2bot.modeling.pairs._AT_ONCE", 1 << 12)  # as small beside a chunk as at full size
    result, line, file = bench("bench_pairs", "--pairs", "8", "128", "--chunk", "4", "--k", "4", "--gradients", "8")
    assert result == line == file
    few, many = result["by_pairs"].values()
    assert few["passes"] == many["passes"] == 2 and many["batch"] == 16 * few["batch"]
    assert few["tensors"] < many["tensors"] < 4 * few["tensors"] and 1 <= many["ratios"]["tensors"] < 1.1
    assert result["gradients"]["difference"] <= 1e-6 < result["gradients"]["largest"]


def measured(module, pairs):
    argv = ["--shape", "tiny", "--device", "cpu", "--pairs", str(pairs), "--chunk", "4", "--k", "4", "--alone"]
    return module.main(argv)


def test_tensor_bytes_count_what_lives(bench):
    """A ratio of peaks means something only if what is freed is taken off, and a view is not counted again."""
    counter, given = __import__("bench_pairs").TensorBytes, torch.zeros(256)
    with counter([given]) as seen:
        given.view(2, 128).flatten()
        assert seen.peak == 0
        first = torch.ones(1024)
        first.view(32, 32).t()
        assert seen.now == seen.peak == 4096
        del first
        torch.ones(512)
    assert seen.now == 0 and seen.peak == 4096
