"""Opening a Fwd2Bot checkpoint: its base, float or quantised, then what was trained."""

from __future__ import annotations

import inspect
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CONFIG_NAME
from ..hosts import host_class, install
from ..modeling.fingerprint import check_base
from ..smol import base_folder, checkpoint_folder, is_smol
from .files import load_weights, read_checkpoint

# the original LLaVA's model types, unknown to transformers
ORIGINAL = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}
# names that belong to the checkpoint's own place on a hub, not to its base
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
_AUTO = ("_from_auto", "_commit_hash", "trust_remote_code", "code_revision", "adapter_kwargs", "subfolder")


def register() -> None:
    """Lets transformers' Auto classes open Fwd2Bot checkpoints, and smol-llava, whose vision tower is ours."""
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


def open_checkpoint(
    path: str | os.PathLike, base: str | os.PathLike | None = None, host: type | None = None, **loading: Any
) -> nn.Module:
    """`load_fwd2bot` without the processor; a `quantization_config` gets the host's list of what stays unquantised."""
    path = local_folder(path, loading)
    for name in ("revision", *_AUTO):
        loading.pop(name, None)
    settings = read_checkpoint(path)
    trained = settings["base"].get("trained")  # adapters="none": the checkpoint brings the language model along
    source = str(path / trained) if trained else base_of(path, base, settings)
    host = host or host_class(settings["base"]["fingerprint"]["class"])
    quantization = loading.get("quantization_config")
    if quantization is not None and getattr(quantization, "llm_int8_skip_modules", "") is None:
        quantization.llm_int8_skip_modules = list(host.quantization_skip)
    model = host.load_base(source, **loading)
    if base is None and is_smol(settings["base"]["name_or_path"]):
        model.name_or_path = settings["base"]["name_or_path"]  # saved again it must not name a cache's folder
    install(model, host, settings["fwd2bot"], settings["image_prompt_ids"], settings["text_prompt_ids"])
    check_base(settings["base"]["fingerprint"], model._base_fingerprint, str(source))
    load_weights(model, path)
    model.adopt_settings(path)
    return model.eval()


def local_folder(path: str | os.PathLike, options: dict[str, Any]) -> Path:
    """`path` itself, the folder in this package, or the folder that the hub's copy of it was brought to."""
    if is_smol(path):
        return checkpoint_folder()
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), **{name: options[name] for name in _HUB if name in options}))
    except Exception as error:  # of many kinds: no such repository, no right to it, no network
        raise FileNotFoundError(
            2, f"There is no such folder here, and the hub did not give it either ({error})", str(path)
        ) from error


def base_of(
    path: str | os.PathLike, base: str | os.PathLike | None = None, settings: dict[str, Any] | None = None
) -> str:
    """Where the base of the checkpoint at `path` is: as given, as named, or at the same place beside the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint names a folder that is not there any more, or no base at all.
    """
    if base is not None:
        return str(base)
    named = (settings or read_checkpoint(path))["base"]
    if is_smol(named["name_or_path"]):
        return str(base_folder())
    relative = named.get("relative_path")
    for folder in (relative and Path(path) / relative, relative and Path(named["name_or_path"])):
        if folder and folder.is_dir():
            return str(folder.resolve())
    if relative or not named["name_or_path"]:
        where = named["name_or_path"] or "a model that had no name"
        raise FileNotFoundError(2, f"The base of {path} is missing. Pass where it is now: base=…", where)
    return named["name_or_path"]


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


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a Fwd2Bot checkpoint, rather than a base, is at `path`."""
    return (Path(path) / CONFIG_NAME).is_file()
