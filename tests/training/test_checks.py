"""Training arguments: each works, or is refused in a sentence before anything is loaded."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from conftest import settings, toy_base
from safetensors.torch import load_file
from train_toys import command, history
from transformers import TrainingArguments

from llava_fwd2bot import Fwd2BotTrainer, Fwd2BotTrainingArguments, add_fwd2bot, load_fwd2bot
from llava_fwd2bot.training.checks import check_negatives
from llava_fwd2bot.training.collator import Fwd2BotCollator
from llava_fwd2bot.training.command import train
from llava_fwd2bot.training.data import LlavaDataset


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha is not supported"),
        (["--use_liger_kernel", "True"], "use_liger_kernel is not supported"),
        (["--optim", "lomo"], "optim lomo is not supported"),
        (["--optim", "galore_adamw_layerwise"], "optim galore_adamw_layerwise is not supported"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "non-reentrant"),
        (["--eval_strategy", "steps"], "need evaluation data"),
        (["--load_best_model_at_end", "True"], "need evaluation data"),
        (["--report_to", "neptune"], "--report_to neptune: not installed"),
        (["--per_device_train_batch_size", "0"], "must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "must be at least 1"),
        (["--num_train_epochs", "0"], "must be above 0"),
        (["--group_by_modality_length", "True", "--train_sampling_strategy", "sequential"], "both order the data"),
        (["--per_device_train_batch_size", "1"], "there are none: a batch is one row.*accumulation adds no negatives"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    base_dir, llava_data, tmp_path, more, message, no_model
):
    """IndexErrors deep in transformers, losses of 0, options that were passed over in silence."""
    with pytest.raises(ValueError, match=message):
        train(command(base_dir, llava_data, tmp_path / "m", *more))


@pytest.fixture
def no_model(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("llava_fwd2bot.training.command.load_for_training", never)


def test_missing_files_and_images_before_the_model_is_loaded(base_dir, llava_data, tmp_path, no_model):
    (llava_data["images"] / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be used[^$]*record 3[^$]*3.png: no such file"):
        train(command(base_dir, llava_data, tmp_path / "m"))
    text = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    llava_data["data"].write_text(json.dumps(text * 4))
    with pytest.raises(ValueError, match="--fwd2bot needs images, and no record of the data has one"):
        train(command(base_dir, llava_data, tmp_path / "n"))


def test_skipped_images_are_counted(base_dir, llava_data, tmp_path):
    """One missing of 665,000 pictures must not end a run; which were left out stands in log and card."""
    (llava_data["images"] / "3.png").unlink()
    (llava_data["images"] / "4.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="skipped a picture"):
        train(command(base_dir, llava_data, tmp_path / "m", "--on_bad_image", "skip", "--num_train_epochs", "1"))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| Images skipped | 2: 3.png, 4.png |" in card and "| Rows | 11 |" in card
    loss = next(line for line in card.splitlines() if line.startswith("| Last answer loss |"))
    assert len(loss.split("|")[2].strip().replace(".", "")) <= 3  # the card gave nine digits of it
    assert history(tmp_path / "m")[-1]["skipped_images"] == 2
    assert json.loads((tmp_path / "m" / "training_run.json").read_text())["skipped_images"] == ["3.png", "4.png"]


def test_negatives():
    check_negatives(0, 100, 1, 1)
    for given in ((100, 100, 1, 1), (1, 100, 4, 1)):
        with pytest.raises(ValueError, match="there are none"):
            check_negatives(*given)
    with pytest.warns(UserWarning, match="Of the 4 rows of a batch 0.4 have a caption on average"):
        check_negatives(10, 100, 4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_negatives(100, 100, 1, 2)  # another process has a negative


def trainer(model, data, tmp_path, **given):
    kind = given.pop("kind", Fwd2BotTrainingArguments)
    args = kind(tmp_path, report_to="none", max_steps=1, per_device_train_batch_size=4, logging_steps=1, **given)
    return Fwd2BotTrainer(model=model, args=args, train_dataset=data, data_collator=Fwd2BotCollator(0))


@pytest.fixture
def data(llava_data, processor):
    return LlavaDataset(llava_data["data"], processor, llava_data["images"])


def test_several_gpus_need_a_launcher(model, base, data, tmp_path):
    """nn.DataParallel's copies never switch their adapter: no gradient for the compress stage, and no error."""
    for found in (model, base):
        args = Fwd2BotTrainingArguments(tmp_path, report_to="none", use_cpu=True)
        args._n_gpu = 2
        with pytest.raises(ValueError, match="torchrun --nproc_per_node 2 -m llava_fwd2bot train"):
            Fwd2BotTrainer(model=found, args=args, train_dataset=data)


def test_unused_columns_are_not_the_captions(model, data, tmp_path):
    """Trainer's default takes away what `forward` does not name: captions, and with them the contrastive loss."""
    running = trainer(model, data, tmp_path, kind=TrainingArguments, remove_unused_columns=True)
    running.train()
    assert "contrastive_loss" in running.state.log_history[0]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_grouping_by_length_opens_no_image(model, data, tmp_path, monkeypatch, strategy):
    """Trainer's samplers ask every row for its ids: hours for LLaVA's data."""
    running = trainer(model, data, tmp_path, train_sampling_strategy=strategy)
    monkeypatch.setattr(LlavaDataset, "__getitem__", lambda *a: pytest.fail("a row was opened"))
    order = list(running._get_train_sampler())
    # batches of rows where this transformers rebalances them; 5.4 has no such strategy
    assert sorted(sum(order, []) if isinstance(order[0], list) else order) == list(range(12))


def test_the_modality_sampler_follows_seed_and_batch(model, data, tmp_path):
    """data_seed was passed over; auto_find_batch_size lowers the batch, and steps must be of one modality still."""
    orders = []
    for given in ({}, {"data_seed": 5}, {"seed": 5}):
        running = trainer(model, data, tmp_path, group_by_modality_length=True, **given)
        orders.append(list(running._get_train_sampler()))
    assert orders[0] != orders[1] == orders[2]
    running._train_batch_size = 2
    assert running._get_train_sampler().step == 2


def test_memory_that_ends_at_one_row_is_told(model, data, tmp_path, monkeypatch):
    """auto_find_batch_size halves the batch until it fits: at one row the contrastive loss would be 0."""
    running = trainer(model, data, tmp_path, auto_find_batch_size=True)
    real = Fwd2BotTrainer.compute_loss

    def full(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Fwd2BotTrainer, "compute_loss", full)
    with pytest.raises(ValueError, match="a batch is one row"):
        running.train()


@pytest.mark.parametrize("more", [["--fwd2bot_adapters", "none"], ["--lora_enable", "False"]])
@pytest.mark.parametrize("fwd2bot", [True, False])
def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(base_dir, llava_data, tmp_path, more, fwd2bot):
    """At 2e-5 only a third of bfloat16 weights moved at all."""
    if not fwd2bot and "none" in more:
        more = ["--lora_enable", "False", "--mm_projector_lr", "2e-5"]
    argv = command(base_dir, llava_data, tmp_path / "m", "--bf16", "True", "--max_steps", "5", *more, fwd2bot=fwd2bot)
    train([*argv, "--learning_rate", "2e-5"])
    after = load_file(tmp_path / "m" / ("base" if fwd2bot else ".") / "model.safetensors")
    before = load_file(base_dir / "model.safetensors")
    names = [name for name in before if "language_model" in name and "_proj" in name]
    assert names and all(after[name].dtype == torch.float32 for name in names)
    moved = torch.cat([(after[n] != before[n].bfloat16().float()).flatten() for n in names])
    assert moved.float().mean() > 0.95
    if fwd2bot:
        assert math.isfinite(load_fwd2bot(tmp_path / "m")[0].compress(torch.randn(1, 3, 32, 32)).sum().item())


def test_resuming_full_fine_tuning_keeps_float32(base_dir, llava_data, tmp_path):
    """The reloaded weights went through the precision of the vision tower."""
    more = ("--bf16", "True", "--lora_enable", "False", "--learning_rate", "1e-4", "--max_steps", "4")
    argv = command(base_dir, llava_data, tmp_path / "m", *more, "--save_strategy", "steps", "--save_steps", "2")
    train(argv)
    whole = history(tmp_path / "m")
    with pytest.warns(UserWarning, match="newer ones"):
        train([*argv, "--resume_from_checkpoint", str(tmp_path / "m" / "checkpoint-2")])
    assert [e["loss"] for e in history(tmp_path / "m")] == [e["loss"] for e in whole]


def test_trained_half_precision_is_refused(processor, data, tmp_path):
    half = add_fwd2bot(toy_base(processor, torch.bfloat16), settings(adapters="none"), processor)
    with pytest.raises(ValueError, match="trained weights are in half precision"):
        trainer(half, data, tmp_path)


def test_pad_is_for_bases_that_take_one_square(base_dir, llava_data, tmp_path, monkeypatch):
    """LLaVA-NeXT's crops were replaced by one padded square, and a KeyError followed."""
    import data_toys

    monkeypatch.setattr(
        "llava_fwd2bot.training.command.AutoProcessor.from_pretrained", lambda *a, **k: data_toys.llava_next()
    )
    with pytest.raises(ValueError, match="has its own .LlavaNextImageProcessorPil"):
        train(command(base_dir, llava_data, tmp_path / "m", "--image_aspect_ratio", "pad"))
