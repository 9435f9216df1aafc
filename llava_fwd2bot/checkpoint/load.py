"""Opening a Fwd2Bot checkpoint: its base, float or quantised, then what was trained."""

from __future__ import annotations

import inspect
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import read_json
from ..hosts.opening import base_of, local_folder, open_checkpoint
from ..smol import base_folder, is_smol
from .files import read_checkpoint

# the original LLaVA's model types, unknown to transformers
ORIGINAL = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}


def register() -> None:
    """Lets transformers' Auto classes open Fwd2Bot checkpoints, and smol-llava, whose vision tower is ours."""
    # late: the original LLaVA runs on a transformers that lacks some of these classes
    from ..hosts import llava, llava_next, llava_onevision
    from ..smol import tower

    for module in (llava, llava_next, llava_onevision, tower):
        module.register()


def load_fwd2bot(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    host: type | None = None,
    **loading: Any,
) -> tuple[nn.Module, Any]:
    """The model and the processor of a Fwd2Bot checkpoint; for the original LLaVA's layout, an OriginalProcessor.

    Args:
        path: the checkpoint's folder, its name on the hub, or "smol-llava", which comes with this package.
        base: the base, where it is no longer at the place that the checkpoint names.
        load_in_4bit, load_in_8bit: quantise the language model's linear layers with bitsandbytes (extra `[quantized]`);
            vision tower, projector, head and summary tokens stay as they are. Fields of BitsAndBytesConfig may follow.
        host: the class of your own that it was trained with (`add_fwd2bot(…, host=…)`), where it was.
        loading: passed to the base's `from_pretrained` (dtype, device_map, attn_implementation, …).

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, damaged, or `base` is not the base it was trained on.
        ImportError: bitsandbytes is needed and missing.
    """
    path = local_folder(path, loading)
    quantization = quantization_config(load_in_4bit, load_in_8bit, loading)
    if quantization is not None:
        loading["quantization_config"] = quantization
    if read_checkpoint(path)["base"]["fingerprint"]["class"] not in ORIGINAL.values():
        register()
    model = open_checkpoint(path, base=base, host=host, **loading)
    return model, model.load_processor(processor_source(path, base))


def load_for_inference(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    device: str | None = None,
    dtype: str = "auto",
    load_4bit: bool = False,
    load_8bit: bool = False,
) -> tuple[nn.Module, Any]:
    """`load_fwd2bot` by what a command line says: names of a device (default: CUDA where there is one) and of a dtype.

    Raises:
        ValueError: there is no such device.
    """
    place = _device(device)
    loading: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if not (load_4bit or load_8bit):
        model, processor = load_fwd2bot(path, base, **loading)
        return model.to(place), processor
    loading["device_map"] = {"": place}
    if load_4bit and dtype == "auto":  # bitsandbytes computes in float32 unless it is told
        loading["dtype"] = getattr(torch, str(read_json(Path(path) / "config.json").get("dtype") or "float16"))
    return load_fwd2bot(path, base, load_in_4bit=load_4bit, load_in_8bit=load_8bit, **loading)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device: say cpu, cuda or cuda:1, for example.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here. Try --device cpu.")
    return device


def processor_source(path: str | os.PathLike, base: str | os.PathLike | None = None) -> str:
    """Where the processor of the checkpoint at `path` is: in it, where it was saved along, else with its base."""
    own = any((Path(path) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    return str(path) if own else base_of(path, base)


def quantization_config(load_in_4bit: bool, load_in_8bit: bool, options: dict[str, Any]) -> Any:
    """A BitsAndBytesConfig, or None; takes its fields out of `options`.

    Raises:
        ImportError: bitsandbytes is missing; the message names the extra.
        ValueError: both widths at once, or fields without a width.
    """
    from transformers import BitsAndBytesConfig

    fields = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    given = {name: options.pop(name) for name in list(options) if name in fields}
    if load_in_4bit and load_in_8bit:
        raise ValueError("Choose one of load_in_4bit and load_in_8bit.")
    if not (load_in_4bit or load_in_8bit):
        if given:
            raise ValueError(f"{', '.join(sorted(given))} need load_in_4bit=True or load_in_8bit=True.")
        return None
    if load_in_4bit:  # as `fwd2bot train --bits 4`: a QLoRA checkpoint must open on the base that it was trained on
        given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **given}
        if isinstance(options.get("dtype"), torch.dtype):
            given.setdefault("bnb_4bit_compute_dtype", options["dtype"])
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            "Quantised loading needs bitsandbytes, which is not installed: pip install 'llava_fwd2bot[quantized]'"
        )
    return BitsAndBytesConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, **given)


def base_source(name: str) -> str:
    """Where the base called `name` is loaded from."""
    return str(base_folder()) if is_smol(name) else name


def original_class_name(base: str | os.PathLike) -> str | None:
    """The model class of a base in the original LLaVA's layout, None for another; told without importing `llava`."""
    from transformers import PretrainedConfig

    config = PretrainedConfig.get_config_dict(base)[0]
    # early ones call themselves "llava", which is transformers' own today, but name their class
    named = [name for name in config.get("architectures") or [] if name in ORIGINAL.values()]
    return ORIGINAL.get(config.get("model_type")) or (named[0] if named else None)


def base_class_name(base: str | os.PathLike) -> str:
    """The name of the model class that the base is opened with, by which `host_class` knows it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    named = original_class_name(base)
    return named or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(AutoConfig.from_pretrained(base))].__name__
