"""The training command: LLaVA's arguments and data; `--fwd2bot K` makes it Fwd2Bot.

    fwd2bot train --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path llava_v1_5_mix665k.json \\
                  --image_folder ./data --output_dir my-fwd2bot --fwd2bot 16

Without the flag it is a plain LLaVA LoRA fine-tune. `python -m llava_fwd2bot train` is the same; torchrun and
accelerate launch it on several processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from ..checkpoint.files import write_card
from ..checkpoint.load import (
    base_class_name,
    base_source,
    original_class_name,
    processor_source,
    quantization_config,
    register,
)
from ..config import Fwd2BotConfig
from ..hosts import add_fwd2bot, host_class
from ..hosts.opening import is_checkpoint, open_checkpoint
from ..modeling.adapters import lora_target
from ..processing.conversation import V1_TEMPLATE
from .arguments import LlavaTrainingArguments, given_settings, parse
from .collator import Fwd2BotCollator
from .data import LlavaDataset
from .trainer import Fwd2BotTrainer

# what may change when a checkpoint is trained further
_LOSS_SETTINGS = ("nested_k", "contrastive_weight", "answer_weight", "distill_weight", "contrastive_chunk")


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
    output = _writable(args.output_dir)
    set_seed(args.seed)
    register()
    name = model_args.model_name_or_path
    if not is_checkpoint(name) and original_class_name(base_source(name)):
        raise ValueError(
            f"{name} is in the layout of the original LLaVA: train it there, by `fwd2bot llava train` with the same "
            "arguments, or name the same model in transformers' layout, such as llava-hf/llava-1.5-7b-hf."
        )
    processor = AutoProcessor.from_pretrained(processor_source(name) if is_checkpoint(name) else base_source(name))
    if data_args.image_aspect_ratio == "pad":
        _pad_to_square(processor)
    dataset = LlavaDataset(
        data_args.data_path,
        processor,
        image_folder=data_args.image_folder,
        caption_data=fwd2bot_args.fwd2bot_caption_data,
        version=model_args.version,
        model_max_length=args.model_max_length,
        seed=args.seed,
    )
    if config is not None and config.contrastive_weight > 0 and not dataset.has_captions:
        warnings.warn(
            "There are no captions, so the contrastive loss is not trained, and the summaries will not serve "
            "retrieval. Give --fwd2bot_caption_data, or a `caption` in the records; or silence this by "
            "--fwd2bot_contrastive_weight 0.",
            stacklevel=2,
        )
    if dataset.formatter.version == "v1":
        # saved with the model: it is asked in the words it was trained in
        processor.chat_template = V1_TEMPLATE.replace("</s>", processor.tokenizer.eos_token)
    model = load_for_training(name, args, given, processor, model_args.tune_mm_mlp_adapter, host)
    trainer = Fwd2BotTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Fwd2BotCollator(processor.tokenizer.pad_token_id),
        processing_class=processor,
    )
    # as LLaVA: the same command goes on where it was stopped
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(output) or args.resume_from_checkpoint)
    trainer.save_state()
    trainer.save_model(str(output))
    if trainer.is_world_process_zero() and config is not None:
        figures = _training_figures(args, data_args, dataset, trainer)
        write_card(trainer.accelerator.unwrap_model(model), output, figures)
    trainer.log_metrics("train", result.metrics)
    return output


def load_for_training(
    name: str,
    args: LlavaTrainingArguments,
    given: dict[str, Any] | None,
    processor: Any,
    projector_alone: bool = False,
    host: type | None = None,
) -> nn.Module:
    """The base in the precision asked for, with Fwd2Bot on it, or a LoRA adapter, or neither."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    loading: dict[str, Any] = {"dtype": dtype}
    if args.attn_implementation:
        loading["attn_implementation"] = args.attn_implementation
    if args.cache_dir:
        loading["cache_dir"] = args.cache_dir
    if args.bits != 16:
        four = args.bits == 4
        fields = {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_type": args.quant_type}
        fields = {**fields, "bnb_4bit_use_double_quant": args.double_quant} if four else {}
        loading["quantization_config"] = quantization_config(four, not four, fields)
        loading["device_map"] = {"": args.device}
    if is_checkpoint(name):
        if given is None:
            raise ValueError(f"{name} is a Fwd2Bot checkpoint: say --fwd2bot K to go on with it.")
        return _go_on(open_checkpoint(name, host=host, **loading), name, args, given)
    if args.bits != 16:
        loading["quantization_config"].llm_int8_skip_modules = list(
            host_class(base_class_name(base_source(name))).quantization_skip
        )
    model = AutoModelForImageTextToText.from_pretrained(base_source(name), **loading)
    model.name_or_path = name  # the name that was given, not where it was found
    model.config.use_cache = False
    if given is not None:
        train_projector = args.mm_projector_lr is not None
        return add_fwd2bot(model, Fwd2BotConfig(**given), processor, train_projector=train_projector, host=host)
    if projector_alone:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        return _float32_where_trained(model)
    return _plain(model, args)


def _go_on(model: nn.Module, name: str, args: LlavaTrainingArguments, given: dict[str, Any]) -> nn.Module:
    """A checkpoint trained further, with what the command line says about the losses; the rest is built in."""
    own = model.fwd2bot_config.to_dict()
    changed = {key for key, value in given.items() if value != own[key]}
    if changed - set(_LOSS_SETTINGS):
        wrong = ", ".join(f"{key} = {own[key]}" for key in sorted(changed - set(_LOSS_SETTINGS)))
        raise ValueError(f"{name} was made with {wrong}, which cannot change any more: leave that argument out.")
    model.fwd2bot_config = Fwd2BotConfig(**{**own, **given})
    if args.mm_projector_lr is not None:
        model._train_projector()
    model.config.use_cache = False
    return model.train()


def _last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was finished; the Trainer writes its state last."""
    found = [p for p in output.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True):
        if (path / "trainer_state.json").is_file():
            return str(path)
        warnings.warn(f"{path} was not finished when the process ended, and is passed over.", stacklevel=3)
    return None


def _plain(model: nn.Module, args: LlavaTrainingArguments) -> nn.Module:
    """LLaVA's own fine-tune: LoRA in the language model's blocks, or the whole language model."""
    projector = ["multi_modal_projector"] if args.mm_projector_lr is not None else None
    if not args.lora_enable:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(projector is not None)
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if args.lora_weight_path:
        return _float32_where_trained(PeftModel.from_pretrained(model, args.lora_weight_path, is_trainable=True))
    lora = LoraConfig(
        r=args.lora_r or 64,
        lora_alpha=args.lora_alpha or 16,  # LLaVA's defaults
        lora_dropout=0.05 if args.lora_dropout is None else args.lora_dropout,
        target_modules=r".*language_model\." + lora_target(Fwd2BotConfig().lora_targets),
        modules_to_save=projector,
        task_type="CAUSAL_LM",
    )
    return _float32_where_trained(get_peft_model(model, lora))


def _float32_where_trained(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a small update is lost on a bfloat16 weight
    return model


def _pad_to_square(processor: Any) -> None:
    """LLaVA-1.5's padding with the mean colour; saved with the processor, so that inference does the same."""
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


def _training_figures(args: Any, data_args: Any, dataset: LlavaDataset, trainer: Any) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        last.update({name: entry[name] for name in entry if name.endswith(("loss", "accuracy"))})
    return {
        "Data": Path(data_args.data_path).name if data_args.data_path else "captions alone",
        "Rows": len(dataset),
        "Steps": trainer.state.global_step,
        "Batch": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "Learning rate": args.learning_rate,
        **{f"Last {name.replace('_', ' ')}": value for name, value in last.items() if name != "train_loss"},
    }
