"""The benchmarks run at a toy's size and report what they promise. Times are not judged: others use this machine."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_fwd2bot.evaluation.measure import PeakMemory

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Runs a benchmark's main in this process: what it returns, the last line it prints, and the file it writes."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads = torch.get_num_threads()

    def run(name: str, *argv: str) -> tuple[dict, dict, dict]:
        module = __import__(name)
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


def test_inference(bench):
    result, line, file = bench("bench_infer", "--k", "4", "2", "--rounds", "2", "--new-tokens", "3")
    assert result == line == file
    for name in ("ttft_ratio", "ttft_ratio_image_over_cached", "ttft_ms", "tokens_per_second", "environment", "shares"):
        assert name in result
    assert set(result["by_k"]) == {"4", "2"}
    assert set(result["by_k"]["4"]["compress_ms_per_image"]) == {"1", "8"}
    size = result["by_k"]["4"]["bytes_per_image"]
    assert size["summary"] * 9 == size["dense"] and size["kv_of_summary"] * 9 == size["kv_of_dense"]
    assert all(math.isfinite(number) and number > 0 for number in numbers(result))


def test_toy_keeps_the_proportions_of_7b(monkeypatch):
    """Its head above all: a toy with a wide head would flatter a method that skips logits."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_common import SHAPES

    toy, full = (SHAPES[name].shares(200) for name in ("toy", "7b"))
    assert toy["head_of_language_model"] <= full["head_of_language_model"] * 1.05
    assert abs(toy["vision_tower"] - full["vision_tower"]) < 0.01
    assert SHAPES["toy"].dense_tokens == SHAPES["7b"].dense_tokens == 576


def test_twin_shares_weights_but_no_adapters(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_common import SHAPES, build, twin, with_fwd2bot

    base = build(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    names = dict(base.named_parameters())
    model = with_fwd2bot(twin(base), 4, 4)
    assert not hasattr(base, "fwd2bot") and not any("lora" in name for name in dict(base.named_parameters()))
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(kept[name] is parameter for name, parameter in names.items())


def test_what_a_cache_costs(on_disk, processor, tmp_path, monkeypatch):
    """The script that states the cost of a cache fills one for real, in every round."""
    pytest.importorskip("lancedb")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_fill

    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    for i in range(3):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    found = bench_fill.measure(str(tmp_path / "m"), [str(tmp_path)], "int4", rounds=2, batch_size=2)
    assert found["images"] == 3 and all(len(rounds) == 2 for rounds in found["seconds"].values())
    assert all(math.isfinite(x) and x > 0 for x in numbers(found["fill_over_model"]))


def test_what_an_exact_search_costs(monkeypatch):
    """Both ways find the same, by the products that are named."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pytest.importorskip("lancedb")
    import bench_search

    found = {screen: bench_search.measure(60, 2, 32, screen) for screen in ("yes", "no", "auto")}
    assert found["yes"]["products"] == {"bfloat16": 1} and found["no"]["products"] == {"float32": 1}
    assert found["auto"]["products"] == {"float32": 1}  # too small to be worth a look
    assert len({(one["t2i_r1"], one["i2t_r1"]) for one in found.values()}) == 1


def test_memory_that_was_freed_before_counts_where_it_is_used_again():
    """The allocator keeps it, and serves the next step with it: `eval cost` said that compressing takes 0 MB."""
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
