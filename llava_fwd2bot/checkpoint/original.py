"""Loading for the original LLaVA's own programs: `load_pretrained_model` that also opens Fwd2Bot checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CONFIG_NAME
from ..hosts.opening import base_of, is_checkpoint, local_folder, open_checkpoint
from ..hosts.original.model import check_version
from ..hosts.original.shims import repaired_forward
from .load import ORIGINAL, quantization_config
from .read import read_checkpoint


def load_pretrained_model(
    model_path: str | os.PathLike,
    model_base: str | os.PathLike | None,
    model_name: str,
    *args: Any,
    num_tokens: int | None = None,
    **kwargs: Any,
) -> tuple[Any, nn.Module, Any, int]:
    """`load_pretrained_model` of LLaVA and LLaVA-NeXT: (tokenizer, model, image processor, context length).

    What is no Fwd2Bot checkpoint goes to LLaVA's own function, with all arguments as they came. Device and precision
    follow LLaVA's rules (float16), but without a GPU the model is loaded onto the CPU in float32.

    Args:
        model_path: a folder, or a name on the hub.
        model_base: the base, where it is not at the place that the checkpoint names.
        num_tokens: j ≤ k, for every answer of this model.

    Raises:
        ValueError: `num_tokens` of a model that has no summary tokens.
    """
    from llava.model import builder

    path = fwd2bot_folder(model_path)
    if path is None:
        check_version(base_generates=True)
        if num_tokens is not None:
            raise ValueError(f"--k is for Fwd2Bot checkpoints, and {model_path} is none.")
        own = getattr(builder.load_pretrained_model, "without_fwd2bot", builder.load_pretrained_model)
        loaded = own(model_path, model_base, model_name, *args, **kwargs)
        repaired_forward(loaded[1])
        return loaded
    return _open(path, model_base, num_tokens, *args, **kwargs)


def fwd2bot_folder(name: str | os.PathLike) -> Path | None:
    """The folder of a Fwd2Bot checkpoint, which may be on the hub; None for anything else."""
    path = Path(name).expanduser()
    if path.exists() or str(name).count("/") != 1:
        return path if is_checkpoint(path) else None
    from huggingface_hub import file_exists

    try:
        return local_folder(name, {}) if file_exists(str(name), CONFIG_NAME) else None
    except Exception:  # no network, no such name: LLaVA's own function says it in its words
        return None


def _open(
    path: Path,
    model_base: str | os.PathLike | None,
    num_tokens: int | None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    overwrite_config: dict[str, Any] | None = None,
    **loading: Any,
) -> tuple[Any, nn.Module, Any, int]:
    kind = read_checkpoint(path)["base"]["fingerprint"]["class"]
    if kind not in ORIGINAL.values():
        raise ValueError(
            f"{path} is a checkpoint on {kind}, of transformers' layout, which LLaVA's programs do not read: use "
            "`fwd2bot eval answer`, or `fwd2bot convert` it to the original's layout."
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
    if on_cpu and loading.get("attn_implementation") == "flash_attention_2":  # LLaVA-NeXT's default
        del loading["attn_implementation"]
    model = open_checkpoint(path, base=model_base, low_cpu_mem_usage=True, **loading)
    processor = model.load_processor(base_of(path, model_base))
    model.default_num_tokens = num_tokens
    for name, value in (overwrite_config or {}).items():
        setattr(model.config, name, value)
    length = getattr(model.config, "max_sequence_length", 2048)
    return processor.tokenizer, model, processor.clip_processor, length
