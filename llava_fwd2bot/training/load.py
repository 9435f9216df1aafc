"""The model that is trained: the base in the requested precision, with Fwd2Bot on it, a LoRA adapter, or neither.

What trains is float32, whatever computes: an update of half precision is mostly below the weight's last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForImageTextToText

from ..checkpoint.load import base_class_name, base_source, quantization_config
from ..compressors import check_compressor
from ..config import Fwd2BotConfig
from ..hosts import add_fwd2bot, host_class
from ..hosts.opening import is_checkpoint, open_checkpoint
from ..modeling.adapters import lora_target
from .arguments import LlavaTrainingArguments
from .checks import float32_where_trained

# what may change when a checkpoint is trained further
_LOSS_SETTINGS = ("nested_k", "contrastive_weight", "answer_weight", "distill_weight", "contrastive_chunk")


def load_for_training(
    name: str,
    args: LlavaTrainingArguments,
    given: dict[str, Any] | None,
    processor: Any,
    projector_alone: bool = False,
    host: type | None = None,
) -> nn.Module:
    """The base in the requested precision, with Fwd2Bot on it, or a LoRA adapter, or neither."""
    if args.deepspeed and dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend())  # ZeRO-3 splits weights as they are loaded
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
            raise ValueError(f"{name} is a Fwd2Bot checkpoint: give --fwd2bot K to train it further.")
        return float32_where_trained(
            _train_further(open_checkpoint(name, host=host, trainable=True, **loading), name, args, given)
        )
    if args.bits != 16:
        loading["quantization_config"].llm_int8_skip_modules = list(
            host_class(base_class_name(base_source(name))).quantization_skip
        )
    model = AutoModelForImageTextToText.from_pretrained(base_source(name), **loading)
    model.name_or_path = name  # the name that was given, not where it was found
    model.config.use_cache = False
    if given is not None:
        train_projector = args.mm_projector_lr is not None
        model = add_fwd2bot(model, Fwd2BotConfig(**given), processor, train_projector=train_projector, host=host)
        return float32_where_trained(model)
    if projector_alone:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        return float32_where_trained(model)
    return _plain(model, args)


def _train_further(model: nn.Module, name: str, args: LlavaTrainingArguments, given: dict[str, Any]) -> nn.Module:
    """A checkpoint trained further, with what the command line says about the losses; the rest is built in."""
    own = model.fwd2bot_config.to_dict()
    changed = {key for key, value in given.items() if value != own[key]}
    if changed - set(_LOSS_SETTINGS):
        wrong = ", ".join(f"{key} = {own[key]}" for key in sorted(changed - set(_LOSS_SETTINGS)))
        raise ValueError(f"{name} was made with {wrong}, which cannot change any more: leave that argument out.")
    config = Fwd2BotConfig(**{**own, **given})
    check_compressor(model._compressor, config)
    model.fwd2bot_config = config
    if args.mm_projector_lr is not None:
        model._train_projector()
    model.config.use_cache = False
    return model.train()


def _plain(model: nn.Module, args: LlavaTrainingArguments) -> nn.Module:
    """LLaVA's own fine-tune: LoRA in the language model's blocks, or the whole language model."""
    projector = ["multi_modal_projector"] if args.mm_projector_lr is not None else None
    if not args.lora_enable:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(projector is not None)
        return float32_where_trained(model)
    from peft import LoraConfig, PeftModel, get_peft_model

    if args.lora_weight_path:
        return float32_where_trained(PeftModel.from_pretrained(model, args.lora_weight_path, is_trainable=True))
    lora = LoraConfig(
        r=args.lora_r or 64,
        lora_alpha=args.lora_alpha or 16,  # LLaVA's defaults
        lora_dropout=0.05 if args.lora_dropout is None else args.lora_dropout,
        target_modules=r".*language_model\." + lora_target(Fwd2BotConfig().lora_targets),
        modules_to_save=projector,
        task_type="CAUSAL_LM",
    )
    return float32_where_trained(get_peft_model(model, lora))
