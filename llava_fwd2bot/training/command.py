"""The training command: LLaVA's arguments and data; `--fwd2bot K` makes it Fwd2Bot.

    fwd2bot train --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path llava_v1_5_mix665k.json \\
                  --image_folder ./data --output_dir my-fwd2bot --fwd2bot 16

Without the flag it is a plain LLaVA LoRA fine-tune. `python -m llava_fwd2bot train` is the same; torchrun and
accelerate launch it on several processes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, EarlyStoppingCallback, set_seed

from ..checkpoint.load import (
    base_source,
    original_class_name,
    processor_source,
    register,
)
from ..checkpoint.write import write_card
from ..config import Fwd2BotConfig
from ..files.check import first
from ..files.outputs import refuse_overlap, refuse_whole_model
from ..hosts.opening import base_of, is_checkpoint
from ..processing.conversation import V1_TEMPLATE
from .arguments import given_settings, parse
from .checks import check_negatives
from .collator import Fwd2BotCollator
from .data import LlavaDataset
from .kept_answers import rows_with_questions
from .load import load_for_training
from .progress import SaveOnSignal, header, next_command
from .resume import (
    check_same_run,
    checkpoint_to_resume,
    data_of,
    is_finished,
    layout_of,
    rows_per_step,
    settings_of,
    write_run,
)
from .shards import Shards, shard_paths
from .trainer import Fwd2BotTrainer

# image processors that resize and crop one square, in whose place LLaVA-1.5's padding one can stand
_PADDED = ("CLIPImageProcessor", "LlavaImageProcessor")


def train(argv: Sequence[str] | None = None, host: type | None = None) -> Path:
    """Runs the command; gives the folder that holds the result. `host`: see `add_fwd2bot`.

    Raises:
        ValueError, OSError: an argument, the data or a folder is wrong; the message says which, and what to do.
    """
    model_args, data_args, args, fwd2bot_args = parse(argv)
    given = given_settings(fwd2bot_args, args)
    config = None if given is None else Fwd2BotConfig(**given)
    if config is not None and config.adapters == "none" and args.bits != 16:
        raise ValueError("--bits 4 and 8 need LoRA: quantised weights do not train. Use --fwd2bot_adapters stage.")
    if config is not None and config.adapters == "none" and args.eval_kept_answers:
        raise ValueError(
            "--eval_kept_answers compares with the base, and --fwd2bot_adapters none trains the base itself: leave one "
            "of them out."
        )
    name = model_args.model_name_or_path
    _keep_inputs(name, data_args, args, fwd2bot_args, config is not None)
    output = _writable(args.output_dir)
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, output)
    set_seed(args.seed)
    register()
    if not is_checkpoint(name) and original_class_name(base_source(name)):
        raise ValueError(
            f"{name} is in the layout of the original LLaVA: train it there, by `fwd2bot llava train` with the same "
            "arguments, or name the same model in transformers' layout, such as llava-hf/llava-1.5-7b-hf."
        )
    processor = AutoProcessor.from_pretrained(processor_source(name) if is_checkpoint(name) else base_source(name))
    if data_args.image_aspect_ratio == "pad":
        _pad_to_square(processor)
    reading = {
        "version": model_args.version,
        "model_max_length": args.model_max_length,
        "seed": args.seed,
        "image_input_names": None if host is None else host.image_input_names,
        "on_bad_image": data_args.on_bad_image,
    }
    captions = fwd2bot_args.fwd2bot_caption_data
    dataset = LlavaDataset(data_args.data_path, processor, data_args.image_folder, captions, **reading)
    eval_dataset = None
    if data_args.eval_data_path or data_args.eval_caption_data:
        folder = data_args.eval_image_folder or data_args.image_folder
        eval_dataset = LlavaDataset(data_args.eval_data_path, processor, folder, data_args.eval_caption_data, **reading)
    known = {table.path: table.digest for table in dataset.tables if isinstance(table, Shards)}
    run = {
        "data": data_of(known, data_path=data_args.data_path, caption_data=captions),
        "settings": settings_of(args, **_more_settings(model_args, data_args, config)),
    }
    if args.resume_from_checkpoint is None and is_finished(output, {**run, "layout": layout_of(args, len(dataset))}):
        if args.process_index == 0:
            print(f"Nothing to do: {output} holds the finished result of this run.", file=sys.stderr)
        return output
    if checkpoint is not None:
        check_same_run(checkpoint, run, args.resume_from_checkpoint is not None)
    dataset.check_files()
    if eval_dataset is not None:
        eval_dataset.check_files()
        if args.eval_kept_answers:
            rows_with_questions(eval_dataset)  # raises, before anything is loaded, where there is none
    _check_data(dataset, config, args)
    if dataset.formatter.version == "v1":
        # saved with the model: prompts are to have the words of training
        processor.chat_template = V1_TEMPLATE.replace("</s>", processor.tokenizer.eos_token)
    model = load_for_training(name, args, given, processor, model_args.tune_mm_mlp_adapter, host)
    planner = None if config is None else model.planner()
    trainer = Fwd2BotTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=Fwd2BotCollator(processor.tokenizer.pad_token_id, planner=planner),
        processing_class=processor,
    )
    trainer.run = run
    interrupt = SaveOnSignal()
    trainer.add_callback(interrupt)
    if data_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(data_args.early_stopping_patience))
    if trainer.is_world_process_zero():
        counts = (len(dataset), dataset.num_images, dataset.num_captioned)
        print(header(model, args, *counts, checkpoint), file=sys.stderr)
    # without --resume_from_checkpoint as LLaVA: the same command goes on where it was stopped
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if interrupt.received is not None:
        saved = output / f"checkpoint-{trainer.state.global_step}"
        print(f"Saved {saved}; the same command resumes there.", file=sys.stderr)
        raise SystemExit(128 + interrupt.received)
    if trainer.state.global_step == 0:
        raise ValueError(
            f"Not one step was trained: {len(dataset)} row(s) make no whole batch. Lower "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out."
        )
    skipped = skipped_images(trainer)
    trainer.save_state()
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        if config is not None:
            figures = _training_figures(args, data_args, dataset, trainer, skipped)
            write_card(trainer.accelerator.unwrap_model(model), output, figures)
        finished = trainer.state.global_step >= trainer.state.max_steps
        steps = {"layout": trainer.run_layout, "steps": trainer.state.global_step, "finished": finished}
        write_run(output, {**run, **steps, "skipped_images": skipped})
    if trainer.is_world_process_zero():
        print(next_command(output, config is not None, dataset.num_captioned > 0), file=sys.stderr)
    trainer.log_metrics("train", {**result.metrics, **({"skipped_images": len(skipped)} if skipped else {})})
    return output


def _keep_inputs(name: str, data_args: Any, args: Any, fwd2bot_args: Any, fwd2bot: bool) -> None:
    """Refuses an --output_dir that overlaps what is read, or with Fwd2Bot another model's folder."""
    models = {"--model_name_or_path": base_source(name), "--lora_weight_path": args.lora_weight_path or None}
    if is_checkpoint(name):
        try:
            models["the base of --model_name_or_path"] = base_of(name)
        except (OSError, ValueError):  # reported, with its remedy, where it is opened
            pass
    files = {"--data_path": data_args.data_path, "--fwd2bot_caption_data": fwd2bot_args.fwd2bot_caption_data}
    files |= {f"--{name}": getattr(data_args, name) for name in ("eval_data_path", "eval_caption_data")}
    for option, path in list(files.items()):  # a pattern stands for files, whose folders are looked at
        folders = {shard.parent: shard for shard in shard_paths(path)} if path else {}
        files |= {f"{option} ({shard})": shard for shard in folders.values()}
    images = {f"--{name}": getattr(data_args, name) for name in ("image_folder", "eval_image_folder")}
    refuse_overlap("--output_dir", args.output_dir, models=models, files=files, images=images)
    if fwd2bot:
        refuse_whole_model("--output_dir", args.output_dir)


def _more_settings(model_args: Any, data_args: Any, config: Fwd2BotConfig | None) -> dict[str, Any]:
    """What decides the result besides TrainingArguments; a base's folder may move, so its name alone counts."""
    more = {name: getattr(model_args, name) for name in ("version", "tune_mm_mlp_adapter")}
    more["model_name_or_path"] = Path(model_args.model_name_or_path).name
    more["image_aspect_ratio"] = data_args.image_aspect_ratio
    return {**more, "fwd2bot": config is not None, **({} if config is None else config.to_dict())}


def _check_data(dataset: LlavaDataset, config: Fwd2BotConfig | None, args: Any) -> None:
    """What --fwd2bot asks of the data: images, and for the contrastive loss captions that meet in a batch.

    Raises:
        ValueError: there is no image in the data, or no pair of captions in any batch.
    """
    if config is None:
        return
    if not dataset.has_images:
        raise ValueError(
            "--fwd2bot needs images, and no record of the data has one. Images are named by 'image' in each record; "
            "without --fwd2bot text alone can be trained."
        )
    if config.contrastive_weight > 0 and not dataset.num_captioned:
        warnings.warn(
            "There are no captions, so the contrastive loss is not trained, and the summaries will not serve "
            "retrieval. Give --fwd2bot_caption_data, or a `caption` in the records; or silence this by "
            "--fwd2bot_contrastive_weight 0.",
            stacklevel=3,
        )
    if config.contrastive_weight > 0:
        check_negatives(dataset.num_captioned, len(dataset), args.train_batch_size, args.world_size)


def skipped_images(trainer: Fwd2BotTrainer) -> list[str]:
    """The images that any process could not use; called by all."""
    dataset = trainer.train_dataset
    if dataset.on_bad_image != "skip":
        return []
    flags = trainer.accelerator.reduce(dataset.bad_images.flags.to(trainer.args.device).long(), reduction="sum")
    names = dataset.bad_images.names
    return [names[at] for at in flags.nonzero().flatten().tolist()]


def _pad_to_square(processor: Any) -> None:
    """LLaVA-1.5's padding with the mean colour; saved with the processor, so that inference does the same.

    Raises:
        ValueError: the base prepares images in another way, e.g. by cutting them into crops.
    """
    kind = type(processor.image_processor).__name__
    if not kind.startswith(_PADDED):
        raise ValueError(
            f"--image_aspect_ratio pad is LLaVA-1.5's way to prepare images; this base has its own ({kind}), which "
            "takes care of their shape: leave --image_aspect_ratio out."
        )
    settings = {**processor.image_processor.to_dict(), "do_pad": True}
    for name in ("image_processor_type", "_processor_class"):
        settings.pop(name, None)
    from transformers import LlavaImageProcessorPil

    processor.image_processor = LlavaImageProcessorPil(**settings)


def _writable(directory: str) -> Path:
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"--output_dir cannot be written ({error.strerror}): choose another", directory
        ) from error
    return path


def _training_figures(
    args: Any, data_args: Any, dataset: LlavaDataset, trainer: Any, skipped: list[str]
) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        last.update({name: entry[name] for name in entry if name.endswith(("loss", "accuracy", "kept_answers"))})
    return {
        "Data": Path(data_args.data_path).name if data_args.data_path else "captions alone",
        "Rows": len(dataset),
        "Steps": trainer.state.global_step,
        "Batch": rows_per_step(trainer.run_layout),
        "Learning rate": args.learning_rate,
        **({"Images skipped": f"{len(skipped)}: {first(skipped)}"} if skipped else {}),
        **{f"Last {name.replace('_', ' ')}": value for name, value in last.items() if name != "train_loss"},
    }
