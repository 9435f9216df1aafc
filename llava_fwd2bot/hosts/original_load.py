"""Loading for the original LLaVA's own programs: `load_pretrained_model` that also opens Fwd2Bot checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from ..checkpoint import check_base, load_weights, read_checkpoint
from ..load import base_of, is_checkpoint, quantization_config
from . import install
from .original import Fwd2BotLlavaLlama


def load_pretrained_model(
    model_path: str | os.PathLike,
    model_base: str | os.PathLike | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    num_tokens: int | None = None,
    **loading: Any,
) -> tuple[Any, nn.Module, Any, int]:
    """LLaVA's `llava.model.builder.load_pretrained_model`: (tokenizer, model, image processor, context length).

    A folder without Fwd2Bot goes to LLaVA's own function. Device and precision follow LLaVA's rules (float16), but
    without a GPU the model is loaded onto the CPU in float32.

    Args:
        model_base: the base, where it is not at the place that the checkpoint names.
        num_tokens: j ≤ k, for every answer of this model.
    """
    from llava.model import builder

    if not is_checkpoint(model_path):
        own = getattr(builder.load_pretrained_model, "without_fwd2bot", builder.load_pretrained_model)
        return own(
            model_path, model_base, model_name, load_8bit, load_4bit, device_map, device, use_flash_attn, **loading
        )
    settings = read_checkpoint(model_path)
    source = base_of(model_path, model_base, settings)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    dtype = loading.pop("torch_dtype", torch.float32 if on_cpu else torch.float16)
    quantization = quantization_config(load_4bit, load_8bit, {"dtype": torch.float32 if on_cpu else torch.float16})
    if quantization is not None:
        quantization.llm_int8_skip_modules = list(Fwd2BotLlavaLlama.quantization_skip)
        loading["quantization_config"] = quantization
    loading["device_map"] = {"": "cpu"} if on_cpu else {"": device} if device != "cuda" else device_map
    if use_flash_attn:
        loading["attn_implementation"] = "flash_attention_2"
    model = Fwd2BotLlavaLlama.base_class.from_pretrained(source, torch_dtype=dtype, low_cpu_mem_usage=True, **loading)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model(device_map=loading["device_map"])
    tower.to(dtype=dtype)
    install(model, Fwd2BotLlavaLlama, settings["fwd2bot"], settings["image_prompt_ids"], settings["text_prompt_ids"])
    check_base(settings["base"]["fingerprint"], model._base_fingerprint, source)
    load_weights(model, model_path)
    model.default_num_tokens = num_tokens
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
    return tokenizer, model.eval(), tower.image_processor, getattr(model.config, "max_sequence_length", 2048)
