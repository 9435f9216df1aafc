"""Fwd2BotTrainer and the training command: what is logged, scaled, saved, resumed, refused."""

import json
import math
import re

import pytest
import torch
from conftest import SIZE, settings
from safetensors.torch import load_file
from train_toys import command, history
from transformers import LlavaForConditionalGeneration

from llava_fwd2bot import add_fwd2bot, load_fwd2bot
from llava_fwd2bot.training.command import train

PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def test_the_one_flag(base_dir, llava_data, tmp_path):
    """LLaVA's arguments and one flag: both losses fall, everything is saved, the model answers as trained."""
    train(command(base_dir, llava_data, tmp_path / "m", "--num_train_epochs", "20", "--learning_rate", "2e-2"))
    log = history(tmp_path / "m")
    assert {"loss", "answer_loss", "contrastive_loss", "temperature", "retrieval_accuracy"} <= set(log[0])
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["answer_loss"] + entry["contrastive_loss"], abs=2e-3)
    assert log[-1]["answer_loss"] < 0.7 * log[0]["answer_loss"]
    model, processor = load_fwd2bot(tmp_path / "m")
    assert all(p.abs().sum() > 0 for name in ("compress", "answer") for p in model._stages.tensors(name).values())
    from llava_fwd2bot.processing.conversation import ConversationFormatter
    from llava_fwd2bot.processing.images import open_image

    prompt = ConversationFormatter(processor).prompt("what colour is the picture?")
    inputs = processor(text=prompt, images=open_image(llava_data["images"] / "0.png"), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() in ("red", "green", "blue")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| Steps | 60 |" in card and str(tmp_path) not in card


def test_without_the_flag_it_is_a_plain_lora_fine_tune(base_dir, llava_data, tmp_path):
    train(command(base_dir, llava_data, tmp_path / "m", fwd2bot=False))
    tensors = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and all("language_model.layers" in name for name in tensors)
    assert not (tmp_path / "m" / "fwd2bot_config.json").exists()
    assert history(tmp_path / "m")[-1]["loss"] < history(tmp_path / "m")[0]["loss"]


def test_plain_loss_is_the_base_models_own(base_dir, llava_data, processor):
    """The head runs only where a row has a label; value and gradient must be those of the whole."""
    from llava_fwd2bot.training.collator import Fwd2BotCollator
    from llava_fwd2bot.training.data import LlavaDataset
    from llava_fwd2bot.training.trainer import _head_where_labelled

    model = LlavaForConditionalGeneration.from_pretrained(base_dir, dtype=torch.float64)
    data = LlavaDataset(llava_data["data"], processor, llava_data["images"])
    batch = Fwd2BotCollator(0)([{k: v for k, v in data[i].items() if k != "caption_ids"} for i in range(4)])
    batch["pixel_values"] = batch["pixel_values"].double()
    found = []
    for inputs in (batch, _head_where_labelled(batch)):
        model.zero_grad()
        out = model(**inputs, num_items_in_batch=torch.tensor(7))
        out.loss.backward()
        found.append((out.loss, model.model.multi_modal_projector.linear_1.weight.grad.clone(), out.logits.shape[1]))
    (loss, grad, length), (fewer_loss, fewer_grad, fewer) = found
    assert fewer < length / 2  # most of a row is the image
    torch.testing.assert_close((fewer_loss, fewer_grad), (loss, grad), rtol=1e-5, atol=1e-6)  # its loss is float32


def test_the_first_stage_trains_the_projector_alone(base_dir, llava_data, tmp_path):
    """LLaVA's pre-training: in bfloat16 too the projector trains in float32, or small updates are lost."""
    more = ("--tune_mm_mlp_adapter", "True", "--bf16", "True", "--learning_rate", "1e-3")
    train(command(base_dir, llava_data, tmp_path / "m", *more, fwd2bot=False))
    before, after = (load_file(folder / "model.safetensors") for folder in (base_dir, tmp_path / "m"))
    changed = {n for n in before if not torch.equal(before[n].bfloat16(), after[n].bfloat16())}
    assert changed and all("multi_modal_projector" in name for name in changed)
    assert {str(after[name].dtype) for name in changed} == {"torch.float32"}


@pytest.mark.parametrize(
    "more",
    [[], ["--fwd2bot_adapters", "none"], ["--group_by_modality_length", "True", "--gradient_accumulation_steps", "2"]],
)
def test_resume_is_exact(base_dir, llava_data, tmp_path, more):
    """Killed after a checkpoint and started again by the same command: the same losses as uninterrupted."""
    common = [*more, "--save_strategy", "steps", "--save_steps", "1", "--fwd2bot_nested_k", "1,2,4"]
    common += ["--gradient_checkpointing", "True", "--mm_projector_lr", "1e-3"]
    if "none" in more:
        common += ["--learning_rate", "1e-3"]
    else:
        common += ["--lora_dropout", "0.1"]
    train(command(base_dir, llava_data, tmp_path / "whole", *common))
    whole = history(tmp_path / "whole")
    # a run that stops early leaves what a killed one leaves: its checkpoints; the schedule must be the long one's
    import shutil

    steps = len(whole)
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{steps // 2}", tmp_path / "killed" / f"checkpoint-{steps // 2}")
    (tmp_path / "killed" / f"checkpoint-{steps}").mkdir()  # killed while it wrote the next one
    with pytest.warns(UserWarning, match="was not finished"):
        train(command(base_dir, llava_data, tmp_path / "killed", *common))
    resumed = history(tmp_path / "killed")
    assert [e["step"] for e in resumed] == [e["step"] for e in whole]
    for a, b in zip(whole, resumed, strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    ours, theirs = (load_file(tmp_path / d / "fwd2bot.safetensors") for d in ("whole", "killed"))
    assert any("projector" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_checkpoints_hold_everything_that_was_trained(base_dir, llava_data, tmp_path):
    """LLaVA's own checkpoints lack the projector, and resume starts it anew without a word."""
    more = ["--save_strategy", "steps", "--save_steps", "2", "--mm_projector_lr", "1e-3"]
    train(command(base_dir, llava_data, tmp_path / "m", *more))
    names = set(load_file(tmp_path / "m" / "checkpoint-2" / "fwd2bot.safetensors"))
    assert {"tokens", "logit_scale", "projector.linear_1.weight", "projector.linear_2.bias"} <= names
    assert load_fwd2bot(tmp_path / "m" / "checkpoint-2")[0].trained_projector() is not None


def test_resume_with_other_settings_is_refused(base_dir, llava_data, tmp_path):
    more = ["--save_strategy", "steps", "--save_steps", "2"]
    train(command(base_dir, llava_data, tmp_path / "m", *more))
    with pytest.raises(ValueError, match="trained with other settings: lora_alpha 8.* → 16"):
        train(command(base_dir, llava_data, tmp_path / "m", *more, "--lora_alpha", "16"))


def test_accumulated_steps_are_the_large_batch(base_dir, llava_data, tmp_path):
    """hosts.md 2.5: both losses are divided by the accumulation steps once. Captions off: their negatives change."""
    off = ["--fwd2bot_contrastive_weight", "0", "--max_steps", "3", "--max_grad_norm", "1e9"]
    data = json.loads(llava_data["data"].read_text())
    for record in data:
        record.pop("caption")
        record["conversations"][1]["value"] = "red"  # equal numbers of labels, so that means of means are the mean
    llava_data["data"].write_text(json.dumps(data))
    runs = []
    for i, (batch, steps) in enumerate([("4", "1"), ("2", "2"), ("1", "4")]):
        out = tmp_path / str(i)
        size = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        train(command(base_dir, llava_data, out, *off, *size))
        runs.append([(e["loss"], e["grad_norm"]) for e in history(out)])
    for other in runs[1:]:
        for (loss, norm), (loss2, norm2) in zip(runs[0], other, strict=True):
            assert loss == pytest.approx(loss2, rel=1e-4) and norm == pytest.approx(norm2, rel=1e-3)


def test_learning_rates_and_decay_of_what_is_new(base_dir, llava_data, processor, tmp_path):
    """Summary tokens and projector have their own rate; weight decay would pull the summary tokens to zero."""
    from transformers import LlavaForConditionalGeneration

    from llava_fwd2bot import Fwd2BotTrainer, Fwd2BotTrainingArguments, add_fwd2bot
    from llava_fwd2bot.config import Fwd2BotConfig

    model = add_fwd2bot(
        LlavaForConditionalGeneration.from_pretrained(base_dir),
        Fwd2BotConfig(lora_r=2),
        processor,
        train_projector=True,
    )
    args = Fwd2BotTrainingArguments(
        tmp_path, learning_rate=1e-4, summary_lr=1e-2, mm_projector_lr=1e-5, weight_decay=0.1, report_to="none"
    )
    optimizer = Fwd2BotTrainer(model=model, args=args).create_optimizer()
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[id(model.fwd2bot.tokens)] == (1e-2, 0.0)
    assert found[id(model.trained_projector().linear_1.weight)] == (1e-5, 0.1)
    assert found[id(next(model._stages.parameters()))] == (1e-4, 0.1)
    assert len(found) == sum(p.requires_grad for p in model.parameters())


def test_llavas_own_arguments(base_dir, llava_data, tmp_path):
    """What LLaVA's finetune_task_lora.sh passes, word for word but for names of files, deepspeed and wandb."""
    argv = f"""--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --model_name_or_path {base_dir}
        --version v1 --data_path {llava_data["data"]} --image_folder {llava_data["images"]}
        --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
        --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
        --group_by_modality_length True --bf16 True --output_dir {tmp_path / "m"} --num_train_epochs 1
        --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
        --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-4
        --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
        --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
        --report_to none --fwd2bot 4"""
    train(argv.split())
    model, processor = load_fwd2bot(tmp_path / "m")
    assert model._stages.lora_config.r == 128 and model.trained_projector() is not None
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
        add_generation_prompt=True,
    )
    assert prompt.startswith("A chat between") and prompt.endswith("USER: <image>\nwhat? ASSISTANT:")


def test_the_trainer_takes_plain_training_arguments(model, llava_data, processor, tmp_path):
    """Drop-in for Trainer: no argument of ours is needed; metrics get the logits, the best model comes back."""
    from transformers import TrainingArguments

    from llava_fwd2bot import Fwd2BotTrainer
    from llava_fwd2bot.training.collator import Fwd2BotCollator
    from llava_fwd2bot.training.data import LlavaDataset

    data = LlavaDataset(llava_data["data"], processor, image_folder=llava_data["images"])
    shapes = []
    args = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=12,
        remove_unused_columns=False,
        report_to="none",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = Fwd2BotTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=Fwd2BotCollator(0),
        compute_metrics=lambda p: shapes.append(p.predictions.shape) or {},
    )
    trainer.train()
    assert shapes[0][0] == 12 and shapes[0][2] == model.config.text_config.vocab_size
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_no_captions_is_said(base_dir, llava_data, tmp_path):
    data = json.loads(llava_data["data"].read_text())
    for record in data:
        record.pop("caption")
    llava_data["data"].write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="There are no captions"):
        train(command(base_dir, llava_data, tmp_path / "m", "--max_steps", "1"))
    assert "contrastive_loss" not in history(tmp_path / "m")[0]


def test_caption_file_and_going_on_from_a_checkpoint(base_dir, llava_data, tmp_path):
    pairs = [{"image": f"{i}.png", "captions": [f"picture {i}", f"it is {i}"]} for i in range(12)]
    (tmp_path / "captions.json").write_text(json.dumps(pairs))
    more = ["--fwd2bot_caption_data", str(tmp_path / "captions.json"), "--max_steps", "2"]
    train(command(base_dir, llava_data, tmp_path / "m", *more))
    assert history(tmp_path / "m")[0]["contrastive_loss"] > 0
    before = load_fwd2bot(tmp_path / "m")[0].compress(PIXELS)
    train(command(tmp_path / "m", llava_data, tmp_path / "n", *more))
    after = load_fwd2bot(tmp_path / "n")[0].compress(PIXELS)
    assert before.shape == after.shape and not torch.equal(before, after)
    further = [*more, "--fwd2bot_nested_k", "1,4", "--mm_projector_lr", "1e-4"]
    train(command(tmp_path / "m", llava_data, tmp_path / "o", *further))
    model = load_fwd2bot(tmp_path / "o")[0]
    assert model.fwd2bot_config.nested_k == [1, 4] and model.trained_projector() is not None
    with pytest.raises(ValueError, match="was made with pooling = mean, which cannot change"):
        train(command(tmp_path / "m", llava_data, tmp_path / "p", *more, "--fwd2bot_pooling", "last"))


@pytest.mark.parametrize("changes", [{"compressor": "pool", "contrastive_weight": 0.0}, {"residual": "pool"}])
def test_going_on_with_shorter_prefixes_than_there_are_is_refused(changes, base_dir, llava_data, processor, tmp_path):
    """A new model was refused, and a checkpoint that is trained further was not."""
    model = add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(base_dir), settings(**changes), processor)
    model.save_pretrained(tmp_path / "m", processor=processor)
    with pytest.raises(ValueError, match="'pool' the first j of k .* leave nested_k out"):
        train(command(tmp_path / "m", llava_data, tmp_path / "n", "--fwd2bot_nested_k", "1,4"))


@pytest.mark.parametrize(
    "more",
    [
        ["--fwd2bot_adapters", "shared"],
        ["--fwd2bot_adapters", "none"],
        ["--lora_enable", "False"],
        ["--fwd2bot_distill_weight", "1.0", "--fwd2bot_bridge", "linear", "--fwd2bot_contrastive_chunk", "2"],
        ["--bf16", "True", "--image_aspect_ratio", "pad"],
        [
            "--evaluation_strategy",
            "no",
            "--version",
            "v1",
            "--mm_use_im_start_end",
            "False",
            "--lazy_preprocess",
            "True",
        ],
    ],
)
def test_variants_train_and_reload(base_dir, llava_data, tmp_path, more):
    train(command(base_dir, llava_data, tmp_path / "m", "--max_steps", "2", *more))
    assert all(math.isfinite(e["loss"]) for e in history(tmp_path / "m"))
    model, _ = load_fwd2bot(tmp_path / "m")
    assert torch.isfinite(model.compress(PIXELS.to(model.dtype)).float()).all()


def test_pad_aspect_ratio_travels_with_the_checkpoint(base_dir, llava_data, tmp_path):
    """Inference must prepare images as training did."""
    train(command(base_dir, llava_data, tmp_path / "m", "--max_steps", "1", "--image_aspect_ratio", "pad"))
    _, processor = load_fwd2bot(tmp_path / "m")
    assert processor.image_processor.do_pad


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fwd2bot", "0"], "must be at least 1, got 0"),
        (["--fwd2bot", "-2"], "must be at least 1, got -2"),
        (["--fwd2bot_nested_k", "1,9"], "from 1 to num_summary_tokens=4"),
        (["--fwd2bot_nested_k", "a"], "is a list such as 1,2,4"),
        (["--tune_mm_mlp_adapter", "True"], "LLaVA's first stage"),
        (["--mm_use_im_start_end", "True"], "must be False"),
        (["--image_aspect_ratio", "anyres"], "must be pad or square"),
        (["--bits", "3"], "must be 4, 8 or 16"),
        (["--bits", "4", "--fwd2bot_adapters", "none"], "need LoRA"),
        (["--freeze_mm_mlp_adapter", "True", "--mm_projector_lr", "1e-5"], "contradict"),
        (["--lora_bias", "all"], "would change the base"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor is not supported"),
        (["--version", "v9"], "v9"),
        (["--data_path", "/nowhere/x.json"], re.escape("/nowhere/x.json")),
    ],
)
def test_bad_arguments_say_what_to_do(base_dir, llava_data, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(command(base_dir, llava_data, tmp_path / "m", *more))


def test_flag_less_fwd2bot_options_are_refused(base_dir, llava_data, tmp_path):
    with pytest.raises(ValueError, match="--fwd2bot_nested_k needs --fwd2bot K"):
        train(command(base_dir, llava_data, tmp_path / "m", "--fwd2bot_nested_k", "1,2", fwd2bot=False))


def test_output_directory_that_cannot_be_written_fails_before_any_work(base_dir, llava_data, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="--output_dir cannot be written"):
        train(command(base_dir, llava_data, tmp_path / "file" / "m"))


def test_data_faults_name_the_record(base_dir, llava_data, tmp_path):
    """Truncated so far that no answer is left: LLaVA's most reported fault, here an error that names the records."""
    data = json.loads(llava_data["data"].read_text())
    data[3]["image"] = "gone.png"
    llava_data["data"].write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"record 3.*gone.png"):
        train(command(base_dir, llava_data, tmp_path / "m"))
    llava_data["data"].write_text("[]")
    with pytest.raises(ValueError, match="no records"):
        train(command(base_dir, llava_data, tmp_path / "n"))


def test_no_supervised_token_is_an_error_that_names_the_records(base_dir, llava_data, tmp_path):
    data = json.loads(llava_data["data"].read_text())
    for record in data:
        record.pop("caption")
        record["conversations"][0]["value"] = "<image>\n" + "what is in the picture " * 20
    llava_data["data"].write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"record \d+"):
        train(command(base_dir, llava_data, tmp_path / "m", "--model_max_length", "60"))
