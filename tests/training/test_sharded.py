"""DDP, FSDP2, ZeRO-2, ZeRO-3 on two processes through the training command: one process' losses, weights and files."""

import importlib.util
import shutil

import pytest
import transformers
from conftest import settings, shake
from safetensors.torch import load_file
from sharded_toys import ROOT, arguments, mixed_data, on_two_processes
from train_toys import history

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.training.command import train

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (extra [deepspeed])"
)
KINDS = ["ddp", "fsdp2", *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero2", "zero3"))]
TENSORS = ("fwd2bot.safetensors", "compress/adapter_model.safetensors", "answer/adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, processor, base_dir):
    """Where the runs begin, their data, and the run of one process."""
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("sharded")
    # all begin with the same adapters and R: ZeRO-3 draws other random numbers while it loads
    model = shake(add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(base_dir), settings(), processor))
    model.save_pretrained(folder / "start", processor=processor)
    data = mixed_data(folder)
    train(arguments(folder / "start", data, folder / "alone", "one process", 4))
    return folder


def weights(output):
    return {f"{file}:{name}": tensor for file in TENSORS for name, tensor in load_file(output / file).items()}


def assert_same(output, expected):
    ours, theirs = weights(output), weights(expected)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 1e-5


def files(folder):
    return {p.name.replace("rng_state_0", "rng_state") for p in folder.rglob("*") if "rng_state_1" not in p.name}


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
    reason="transformers 5.4 resumes several processes on a CPU from cpu:0, a place that torch does not load to",
)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(alone, tmp_path, kind):
    """Losses and weights to 1e-5 over 20 steps in which a rank may have only text, only captions, or both.

    What is in parts is gathered: the checkpoints have the files of one process. The second run resumes from the
    checkpoint of one process; afterwards one process resumes from that of the two.
    """
    data, mine = alone / "data.json", tmp_path / kind
    resumed = tmp_path / "resumed"
    shutil.copytree(alone / "alone" / "checkpoint-10", resumed / "checkpoint-10")
    runs = [arguments(alone / "start", data, output, kind, 2) for output in (mine, resumed)]
    on_two_processes(tmp_path / "log", *runs)
    expected, found = history(alone / "alone"), history(mine)
    assert len(found) == len(expected) == 20
    for one, two in zip(expected, found, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5 * max(1, one["loss"])
        assert one.get("retrieval_accuracy") == two.get("retrieval_accuracy")
    begun, trained = weights(alone / "start"), weights(mine)
    assert max((begun[name] - trained[name]).abs().max() for name in begun) >= 1e-3  # a hundred times what is allowed
    assert_same(mine, alone / "alone")
    assert_same(mine / "checkpoint-10", alone / "alone" / "checkpoint-10")
    assert_same(resumed, alone / "alone")
    assert files(mine / "checkpoint-10") == files(alone / "alone" / "checkpoint-10")

    back = tmp_path / "back"
    shutil.copytree(mine / "checkpoint-10", back / "checkpoint-10")
    train(arguments(alone / "start", data, back, "one process", 4))
    assert_same(back, alone / "alone")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_configurations_for_accelerate_can_be_read(name, monkeypatch):
    """Each of scripts/accelerate/ by accelerate itself, which refuses names that it does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(ROOT)  # where the DeepSpeed configurations are named from
    config = load_config_from_file(f"scripts/accelerate/{name}.yaml")
    assert config.num_processes == 8
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        from llava_fwd2bot.training.checks import zero_stage

        assert zero_stage(config.deepspeed_config["deepspeed_config_file"]) == int(name[-1])
