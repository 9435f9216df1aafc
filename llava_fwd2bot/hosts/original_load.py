"""Loading for the original LLaVA's own programs: `load_pretrained_model` that also opens Fwd2Bot checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from ..load import base_of, is_checkpoint, open_checkpoint, quantization_config
from .original import check_version


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
    overwrite_config: dict[str, Any] | None = None,
    **loading: Any,
) -> tuple[Any, nn.Module, Any, int]:
    """`load_pretrained_model` of LLaVA and LLaVA-NeXT: (tokenizer, model, image processor, context length).

    A folder without Fwd2Bot goes to LLaVA's own function. Device and precision follow LLaVA's rules (float16), but
    without a GPU the model is loaded onto the CPU in float32.

    Args:
        model_base: the base, where it is not at the place that the checkpoint names.
        num_tokens: j ≤ k, for every answer of this model.
        overwrite_config: LLaVA-NeXT's: settings of the base to change, of those that are read while it runs.
    """
    from llava.model import builder

    if not is_checkpoint(model_path):
        check_version(base_generates=True)
        own = getattr(builder.load_pretrained_model, "without_fwd2bot", builder.load_pretrained_model)
        return own(
            model_path, model_base, model_name, load_8bit, load_4bit, device_map, device, use_flash_attn, **loading
        )
    for name in ("multimodal", "customized_config"):  # LLaVA-NeXT's help to tell the class, which is known here
        loading.pop(name, None)
    if isinstance(loading.get("torch_dtype"), str):
        loading["torch_dtype"] = getattr(torch, loading["torch_dtype"])
    on_cpu = "cpu" in (device, device_map) or not torch.cuda.is_available()
    loading.setdefault("torch_dtype", torch.float32 if on_cpu else torch.float16)
    if on_cpu and loading["torch_dtype"] is torch.float16:  # LLaVA-NeXT's default
        loading["torch_dtype"] = torch.float32
    quantization = quantization_config(load_4bit, load_8bit, {"dtype": loading["torch_dtype"]})
    if quantization is not None:
        loading["quantization_config"] = quantization
    loading["device_map"] = {"": "cpu"} if on_cpu else {"": device} if device != "cuda" else device_map
    if use_flash_attn:
        loading["attn_implementation"] = "flash_attention_2"
    model = open_checkpoint(model_path, base=model_base, low_cpu_mem_usage=True, **loading)
    source = base_of(model_path, model_base)
    model.default_num_tokens = num_tokens
    for name, value in (overwrite_config or {}).items():
        setattr(model.config, name, value)
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
    image_processor = model.get_vision_tower().image_processor
    return tokenizer, model, image_processor, getattr(model.config, "max_sequence_length", 2048)
