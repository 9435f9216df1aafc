"""LLaVA's own train() under ZeRO-3, as its scripts run it, on two processes of a CPU: what ZeRO-2 trains and saves."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip(
    "llava.model", reason="the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed (extra [deepspeed])", allow_module_level=True)

from original_ranks import STEPS, configuration, mixed, on_two_processes  # noqa: E402
from original_toys import clip_tower, conversations, on_disk  # noqa: E402

from llava_fwd2bot.checkpoint.original import load_pretrained_model  # noqa: E402
from llava_fwd2bot.checkpoint.read import read_checkpoint  # noqa: E402

TENSORS = ("fwd2bot.safetensors", "compress/adapter_model.safetensors", "answer/adapter_model.safetensors")


def command(folder: Path, output: Path, stage: int) -> list[str]:
    """scripts/v1_5/finetune_lora.sh, as far as a CPU goes."""
    return [
        *("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0"),
        *("--mm_projector_lr", "2e-3", "--deepspeed", str(configuration(folder, stage))),
        *("--model_name_or_path", str(folder / "llava-toy"), "--version", "v1"),
        *("--data_path", str(folder / "mixed.json"), "--image_folder", str(folder / "data" / "images")),
        *("--vision_tower", str(folder / "clip"), "--mm_projector_type", "mlp2x_gelu"),
        *("--mm_vision_select_layer", "-2", "--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False"),
        *("--image_aspect_ratio", "pad", "--output_dir", str(output), "--max_steps", str(STEPS)),
        *("--per_device_train_batch_size", "2", "--evaluation_strategy", "no", "--save_strategy", "steps"),
        *("--save_steps", str(STEPS // 2), "--learning_rate", "1e-3", "--adam_epsilon", "1e-2", "--logging_steps", "1"),
        *("--model_max_length", "256", "--gradient_checkpointing", "True", "--lazy_preprocess", "True"),
        *("--report_to", "none", "--use_cpu", "True", "--fwd2bot", "4", "--fwd2bot_nested_k", "2,4"),
    ]


def steps(output: Path, what: str) -> list[list[float]]:
    """Of each process, the loss or the number of images in each step."""
    files = (output / f"steps.{rank}.json" for rank in (0, 1))
    return [[step[what] for step in json.loads(file.read_text())] for file in files]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file}:{name}": tensor for file in TENSORS for name, tensor in load_file(folder / file).items()}


def furthest(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """ZeRO-2, ZeRO-3, and each of them again from the checkpoint of the other."""
    folder = tmp_path_factory.mktemp("zero")
    tower = clip_tower(folder / "clip")
    # LLaVA puts the tower in half precision, and DeepSpeed may take it back: of such numbers nothing is lost
    state = load_file(tower / "model.safetensors")
    save_file(
        {n: t.half().to(t.dtype) if t.is_floating_point() else t for n, t in state.items()},
        tower / "model.safetensors",
        metadata={"format": "pt"},
    )
    on_disk(folder / "llava-toy", tower)
    conversations(folder / "data")
    mixed(folder, folder / "data" / "images")
    on_two_processes(folder / "log", command(folder, folder / "two", 2), command(folder, folder / "three", 3))
    for output, of in (("resumed", "two"), ("back", "three")):
        shutil.copytree(folder / of / f"checkpoint-{STEPS // 2}", folder / output / f"checkpoint-{STEPS // 2}")
    on_two_processes(folder / "again", command(folder, folder / "resumed", 3), command(folder, folder / "back", 2))
    return folder


def test_zero3_is_zero2(runs):
    """LLaVA's scripts pass zero3.json: losses and weights are those of ZeRO-2, where nothing of the base is split."""
    expected, found = steps(runs / "two", "loss"), steps(runs / "three", "loss")
    assert [len(losses) for losses in found] == [STEPS, STEPS]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    pairs = list(zip(*steps(runs / "three", "images"), strict=True))  # what the ranks' calls depend on
    assert any(one != other and one and other for one, other in pairs)
    assert any(bool(one) != bool(other) for one, other in pairs)  # one has text alone
    assert furthest(runs / "two", runs / "three") <= 1e-5


def test_the_base_is_read_whole(runs):
    """Outside of its layers' calls ZeRO-3's weights are empty: the base's numbers must be those that ZeRO-2 noted."""
    two, three = (read_checkpoint(runs / name)["base"]["fingerprint"] for name in ("two", "three"))
    assert two["probes"] and two == three
    _, model, _, _ = load_pretrained_model(runs / "three", None, "llava-fwd2bot", device="cpu")
    assert model.compress(images=torch.randn(1, 3, 32, 32, dtype=model.dtype)).shape == (1, 4, 64)


def test_a_run_goes_on_either_way(runs):
    """ZeRO-3 resumes what ZeRO-2 saved, and ZeRO-2 what ZeRO-3 saved, to the weights of the run that was not cut."""
    half = f"checkpoint-{STEPS // 2}"
    assert furthest(runs / "two" / half, runs / "three" / half) <= 1e-5
    assert furthest(runs / "two" / half, runs / "two") >= 1e-3  # a hundred times what is allowed
    for name in ("resumed", "back"):
        assert furthest(runs / name, runs / "two") <= 1e-5
