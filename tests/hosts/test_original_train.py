"""LLaVA's own train() with the one flag, and without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip(
    "llava.model", reason="the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
)

from original_toys import clip_tower, conversations, on_disk  # noqa: E402

from llava_fwd2bot.checkpoint.original import load_pretrained_model  # noqa: E402
from llava_fwd2bot.checkpoint.read import read_checkpoint  # noqa: E402
from llava_fwd2bot.hosts.original import shims
from llava_fwd2bot.training import original as programs  # noqa: E402
from llava_fwd2bot.training.original import train  # noqa: E402


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tower = clip_tower(folder / "clip")
    return {"tower": tower, "base": on_disk(folder / "llava-toy", tower), **conversations(folder / "data")}


def command(toys: dict[str, Path], output: Path, *more: str) -> list[str]:
    """scripts/v1_5/finetune_task_lora.sh, as far as a CPU goes."""
    return [
        *("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "2e-3"),
        *("--model_name_or_path", str(toys["base"]), "--version", "v1", "--data_path", str(toys["data"])),
        *("--image_folder", str(toys["images"]), "--vision_tower", str(toys["tower"])),
        *("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2", "--mm_use_im_start_end", "False"),
        *("--mm_use_im_patch_token", "False", "--image_aspect_ratio", "pad", "--group_by_modality_length", "True"),
        *("--output_dir", str(output), "--num_train_epochs", "4", "--per_device_train_batch_size", "4"),
        *("--evaluation_strategy", "no", "--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "2e-2"),
        *("--warmup_ratio", "0.03"),
        *("--lr_scheduler_type", "cosine", "--logging_steps", "1", "--model_max_length", "256"),
        *("--gradient_checkpointing", "True", "--lazy_preprocess", "True", "--report_to", "none", "--use_cpu", "True"),
        *more,
    ]


def history(output: Path) -> list[dict]:
    return [e for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def test_the_one_flag_on_their_own_train(toys, tmp_path):
    """Loss falls, both adapters and R change; what is saved opens as it was, and the stock loader refuses it."""
    argv = sys.argv
    kept = {}

    def watch(model, *args, **kwargs):  # the model as training begins, and as it ends
        installed = install(model, *args, **kwargs)
        kept.update(model=installed, start={n: p.detach().clone() for n, p in trained(installed)})
        return installed

    install = programs.install
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "install", watch)
        more = ("--fwd2bot", "4", "--num_train_epochs", "16", "--image_aspect_ratio", "square")
        train(command(toys, tmp_path / "m", *more))
    assert sys.argv is argv
    log = history(tmp_path / "m")
    assert {"answer_loss", "contrastive_loss"} <= set(log[0])
    assert log[-1]["answer_loss"] < 0.7 * log[0]["answer_loss"]
    changed = {n for n, p in trained(kept["model"]) if not torch.equal(p, kept["start"][n])}
    for part in ("lora_B.compress", "lora_B.answer", "fwd2bot.tokens", "mm_projector"):
        assert any(part in name for name in changed), part
    assert read_checkpoint(tmp_path / "m")["fwd2bot"].lora_r == 4
    assert {p.name for p in (tmp_path / "m").iterdir()} >= {"compress", "answer", "fwd2bot.safetensors"}
    from llava.model import LlavaLlamaForCausalLM

    with pytest.raises(OSError):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path / "m")
    _, again, _, _ = load_pretrained_model(tmp_path / "m", None, "llava-fwd2bot", device="cpu")
    assert again.config.image_aspect_ratio == "square"  # as it was trained; the base says pad
    ids, pixels = torch.tensor([[1, -200, 5, 6]]), torch.randn(1, 3, 32, 32)
    given = {"images": pixels, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(ids, **given), kept["model"].eval().generate(ids, **given))


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.skipif(transformers.__version__ < "5", reason="bitsandbytes of today needs transformers 5")
def test_qlora(toys, tmp_path):
    """--bits 4 of LLaVA's scripts: their trainer refuses a quantised model that shows no adapters."""
    pytest.importorskip("bitsandbytes")
    train(command(toys, tmp_path / "m", "--fwd2bot", "4", "--num_train_epochs", "1", "--bits", "4"))
    _, model, _, _ = load_pretrained_model(tmp_path / "m", None, "llava-fwd2bot", load_4bit=True, device="cpu")
    assert model.compress(images=torch.randn(1, 3, 32, 32, dtype=model.dtype)).shape == (1, 4, 64)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--tune_mm_mlp_adapter", "True"), "first stage"),
        (("--pretrain_mm_mlp_adapter", "mm_projector.bin"), "a whole LLaVA"),
        (("--mm_use_im_patch_token", "True"), "vocabulary of .* was changed"),
    ],
)
def test_what_could_not_be_opened_again_is_refused(toys, tmp_path, more, message):
    """Each of these trains to its end, and gives a checkpoint that fits no base."""
    with pytest.raises(ValueError, match=message):
        train(command(toys, tmp_path / "o", "--fwd2bot", "4", *more))


def test_outputs_and_files_are_checked_first(toys, tmp_path):
    """The faults of our own command: a base written over, images that are gone or that no key of LLaVA names."""
    with pytest.raises(ValueError, match="--output_dir .* is also --model_name_or_path"):
        train(command(toys, toys["base"], "--fwd2bot", "4"))
    records = json.loads(Path(toys["data"]).read_text())
    shown = next(i for i, record in enumerate(records) if record.get("image"))
    data = tmp_path / "data.json"
    for change, message in (
        ({"image": "gone.png"}, f"record {shown}: .*gone.png: no such file"),
        ({"video": "a.mp4"}, f"record {shown}: has 'video'"),
    ):
        data.write_text(json.dumps([{**r, **(change if i == shown else {})} for i, r in enumerate(records)]))
        with pytest.raises(ValueError, match=message):
            train(command(toys, tmp_path / "m", "--fwd2bot", "4", "--data_path", str(data)))
    data.write_text(json.dumps([{**r, "image": None} for r in records]))
    with pytest.raises(ValueError, match="--fwd2bot needs images"):
        train(command(toys, tmp_path / "m", "--fwd2bot", "4", "--data_path", str(data)))


def test_damaged_images_may_be_skipped(toys, tmp_path):
    """LLaVA opens images as their turn comes: here a missing one is left out at once, a damaged one when it is met."""
    from shutil import copytree

    images = copytree(toys["images"], tmp_path / "images")
    records = json.loads(Path(toys["data"]).read_text())
    names = [record["image"] for record in records if record.get("image")]
    (images / names[0]).unlink()
    (images / names[1]).write_bytes(b"no picture")
    for record in records:  # under another tool's key
        if record.get("image"):
            record["images"] = [record.pop("image")]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    more = ("--fwd2bot", "4", "--num_train_epochs", "1", "--data_path", str(data), "--image_folder", str(images))
    with pytest.warns(UserWarning, match="skipped a picture"):
        train(command(toys, tmp_path / "m", *more, "--on_bad_image", "skip"))
    run = json.loads((tmp_path / "m" / "training_run.json").read_text())
    assert run["skipped_images"] == names[:2] and run["finished"]


def test_the_named_checkpoint_and_the_finished_run(toys, tmp_path, monkeypatch, capsys):
    """LLaVA resumes from the newest whatever is named, and trains 0 steps of other data without a word."""
    if transformers.__version__ < "5":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    argv = command(toys, tmp_path / "m", "--fwd2bot", "4", "--lora_dropout", "0")
    train(argv)
    files = {p: p.read_bytes() for p in (tmp_path / "m").iterdir() if p.is_file()}
    whole = history(tmp_path / "m")
    train(argv)
    assert "Nothing to do" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is finished, and was trained with other settings: learning_rate"):
        train([*argv, "--learning_rate", "1e-3"])
    assert {p: p.read_bytes() for p in (tmp_path / "m").iterdir() if p.is_file()} == files
    capsys.readouterr()
    with pytest.warns(UserWarning, match="newer ones"):
        train([*argv, "--resume_from_checkpoint", str(tmp_path / "m" / "checkpoint-2")])
    assert capsys.readouterr().out.count("'loss'") == len(whole) - 2


def test_resume_is_exact(toys, tmp_path, monkeypatch):
    """LLaVA's mid-training checkpoints leave projector and tokens out; the same command must go on with everything."""
    if transformers.__version__ < "5":  # its Trainer reads its own random state in a way that torch 2.6 refuses
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    more = ("--fwd2bot", "4", "--fwd2bot_nested_k", "1,2,4", "--lora_dropout", "0")
    train(command(toys, tmp_path / "whole", *more))
    import shutil

    whole = history(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    train(command(toys, tmp_path / "cut", *more))
    assert [e["loss"] for e in history(tmp_path / "cut")] == pytest.approx([e["loss"] for e in whole], abs=1e-4)


def test_accumulated_steps_are_the_large_batch(toys, tmp_path, monkeypatch):
    """The answer loss is a mean over the tokens of the whole step, also in a trainer that does not count them."""
    if OLD:  # as above
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    records = json.loads(toys["data"].read_text())
    records.append(json.loads(json.dumps(records[0])))  # eight: steps of four fill an epoch
    for i, record in enumerate(records):  # answers of very unequal length
        record["conversations"][1]["value"] = " ".join(["red", "two dogs", "blue"][: i % 3 + 1] * (1 + 3 * (i % 2)))
    uneven = {**toys, "data": tmp_path / "uneven.json"}
    uneven["data"].write_text(json.dumps(records))
    more = ("--fwd2bot", "4", "--fwd2bot_contrastive_weight", "0", "--lora_dropout", "0", "--num_train_epochs", "4")
    more += ("--max_grad_norm", "1e9", "--save_steps", "1")
    found = []
    for rows, steps in ((4, 1), (1, 4)):
        size = ("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(steps))
        torch.manual_seed(0)  # R and LoRA are drawn before LLaVA sets its seed
        train(command(uneven, tmp_path / str(rows), *more, *size))
        found.append([e["loss"] for e in history(tmp_path / str(rows))])
    assert len(found[1]) == 8 and found[1][:3] == pytest.approx(found[0][:3], abs=2e-3)
    import shutil

    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "1" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")  # within an epoch
    train(command(uneven, tmp_path / "cut", *more, *size))
    assert [e["loss"] for e in history(tmp_path / "cut")] == pytest.approx(found[1], abs=1e-4)


def test_without_the_flag_it_is_their_lora(toys, tmp_path):
    train(command(toys, tmp_path / "llava-lora", "--num_train_epochs", "1"))
    names = {p.name for p in (tmp_path / "llava-lora").iterdir()}
    assert "non_lora_trainables.bin" in names and "adapter_config.json" in names
    assert not any("fwd2bot" in name for name in names)
    with pytest.raises(ValueError, match="--fwd2bot_nested_k needs --fwd2bot K"):
        train(command(toys, tmp_path / "x", "--fwd2bot_nested_k", "1,2"))


def test_our_own_training_says_where_to_go(toys, tmp_path, capsys):
    """The same arguments, another command: said before anything is loaded."""
    from llava_fwd2bot.cli.main import main

    if transformers.__version__ < "5":
        pytest.skip("fwd2bot train needs transformers 5")
    argv = ["--model_name_or_path", str(toys["base"]), "--data_path", str(toys["data"]), "--fwd2bot", "4"]
    assert main(["train", *argv, "--output_dir", str(tmp_path / "o")]) == 1
    assert "fwd2bot llava train" in capsys.readouterr().err


def test_nothing_stays_patched(toys, tmp_path):
    """Repairs hold while LLaVA's function runs, and no longer."""
    import transformers.trainer
    from llava.train import llava_trainer
    from llava.train import train as module

    before = (module.LLaVATrainer, module.LlavaLlamaForCausalLM, module.maybe_zero_3)
    had = hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS")
    with pytest.raises(Exception), shims.importable(), shims.applied(module, llava_trainer):  # noqa: B017
        raise Exception("whatever happens")
    assert before == (module.LLaVATrainer, module.LlavaLlamaForCausalLM, module.maybe_zero_3)
    assert had == hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS")


OLD = transformers.__version__ < "5"


def test_each_repair_is_needed_here_or_gone():
    """A repair that this version no longer needs is to be taken out; on the versions that LLaVA pins none is needed."""
    found = {shim.name for shim in shims.SHIMS if shim.needed()} - {"deepspeed"}
    past = {"past"} if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else set()
    assert found == (set() if OLD else {"layer-list", "trainer", "quantised", "arguments"} | past)


@pytest.mark.skipif(not OLD, reason="the stock training does not run on transformers 5")
def test_without_the_flag_losses_are_the_stock_ones(toys, tmp_path, monkeypatch):
    """The launcher without --fwd2bot changes nothing: the same losses as LLaVA's own train()."""
    from llava.train import train as stock

    torch.manual_seed(0)  # LoRA is drawn before LLaVA sets its seed
    train(command(toys, tmp_path / "ours", "--num_train_epochs", "2"))
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["train.py", *command(toys, tmp_path / "stock", "--num_train_epochs", "2")])
    try:
        stock.train()
    except ModuleNotFoundError as error:  # at the very end, where it saves; the log is there
        assert error.name == "deepspeed"
    assert [e["loss"] for e in history(tmp_path / "ours")] == pytest.approx(
        [e["loss"] for e in history(tmp_path / "stock")], abs=1e-6
    )
