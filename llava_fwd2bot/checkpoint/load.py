"""Opening a Fwd2Bot checkpoint: its base, float or quantised, then what was trained."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..extras import require
from ..files.text import read_json
from ..hosts import host_class
from ..hosts.opening import base_of, is_checkpoint, local_folder, naming, open_checkpoint
from ..smol import base_folder, is_smol
from .read import read_checkpoint

if TYPE_CHECKING:
    from ..mixin import Fwd2BotMixin

# the original LLaVA's model types, unknown to transformers
ORIGINAL = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}


def register() -> None:
    """Lets transformers' Auto classes and pipelines open Fwd2Bot checkpoints, and smol-llava by its name."""
    # late: the original LLaVA runs on a transformers that lacks some of these classes
    from ..hosts import llava, llava_next, llava_onevision
    from ..smol import hub, tower

    for module in (llava, llava_next, llava_onevision, tower, hub):
        module.register()


def load_fwd2bot(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    host: type | None = None,
    trainable: bool = False,
    merge: Literal["answer", "compress"] | None = None,
    **loading: Any,
) -> tuple[Fwd2BotMixin, Any]:
    """The model and the processor of a Fwd2Bot checkpoint; for the original LLaVA's layout, an OriginalProcessor.

    Args:
        path: the checkpoint's folder, its name on the hub, or "smol-llava", which comes with this package.
        base: the base, where it is no longer at the place that the checkpoint names.
        load_in_4bit, load_in_8bit: quantise the language model's linear layers with bitsandbytes (extra `[quantized]`);
            vision tower, projector, head and summary tokens stay as they are. Fields of BitsAndBytesConfig may follow.
        host: the class of your own that it was trained with (`add_fwd2bot(…, host=…)`), where it was.
        trainable: keep the adapters in float32, to train them further; otherwise they come in the base's dtype.
        merge: add the adapter of this stage to the weights of a float base, so that the stage costs what the base
            costs. "answer" is for answers from stored summaries, "compress" for summaries and retrieval; what needs the
            other stage or the base raises ValueError. With adapters="shared" both stages are there.
        loading: passed to the base's `from_pretrained` (dtype, device_map, attn_implementation, …).

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, damaged, or `base` is not the one it was trained on; `merge`
            with a quantised base, with `trainable`, or of a checkpoint without adapters.
        ImportError: bitsandbytes is needed and missing.
    """
    path = local_folder(path, loading)
    quantization = quantization_config(load_in_4bit, load_in_8bit, loading)
    if quantization is not None:
        loading["quantization_config"] = quantization
    if read_checkpoint(path)["base"]["fingerprint"]["class"] not in ORIGINAL.values():
        register()
    model = open_checkpoint(path, base=base, host=host, trainable=trainable, merge=merge, **loading)
    return model, model.load_processor(processor_source(path, base))


def load_plain(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    **loading: Any,
) -> tuple[nn.Module, Any]:
    """The model and the processor of a LLaVA without Fwd2Bot: a base, or what `fwd2bot train` writes without the flag.

    Args:
        path: a folder with a model, or with a PEFT adapter, which names its base.
        base: the adapter's base, where it is no longer at the place that the adapter names.
        load_in_4bit, load_in_8bit, loading: as of `load_fwd2bot`.

    Raises:
        FileNotFoundError, ValueError: there is neither, or the model is in the original LLaVA's layout.
    """
    path, adapter = Path(path), None
    if (path / "adapter_config.json").is_file():
        if not (path / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(2, "The adapter has no adapter_model.safetensors", str(path))
        adapter = read_json(path / "adapter_config.json")
        source = base_source(str(base or adapter.get("base_model_name_or_path") or ""))
    else:
        source = str(path)
    if not source or (source.startswith((".", "/", "~")) and not Path(source).is_dir()):
        raise FileNotFoundError(2, f"The base of {path} is missing. Pass where it is now: base=…", source or "no name")
    if original_class_name(source):
        raise ValueError(f"{source} is in the layout of the original LLaVA: ask it by its own programs.")
    register()
    quantization = quantization_config(load_in_4bit, load_in_8bit, loading)
    if quantization is not None:
        quantization.llm_int8_skip_modules = list(host_class(base_class_name(source)).quantization_skip)
        loading["quantization_config"] = quantization
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(source, **loading)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path))
    return model.eval(), AutoProcessor.from_pretrained(str(path) if _has_processor(path) else source)


def is_plain(path: str | os.PathLike) -> bool:
    """Whether a model or an adapter without Fwd2Bot is at `path`."""
    names = ("adapter_config.json", "config.json")
    return not is_checkpoint(path) and any((Path(path) / name).is_file() for name in names)


def load_for_inference(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    device: str | None = None,
    dtype: str = "auto",
    load_4bit: bool = False,
    load_8bit: bool = False,
    load: Callable[..., tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """`load_fwd2bot` by what a command line says: names of a device (default: CUDA where there is one) and of a dtype.

    Raises:
        ValueError: there is no such device.
    """
    load = load or load_fwd2bot
    place = _device(device)
    loading: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if not (load_4bit or load_8bit):
        model, processor = load(path, base, **loading)
        return model.to(place), processor
    loading["device_map"] = {"": place}
    if load_4bit and dtype == "auto":  # bitsandbytes computes in float32 unless it is set
        config = Path(path) / "config.json"
        named = read_json(config).get("dtype") if config.is_file() else None  # a plain adapter has none
        loading["dtype"] = getattr(torch, str(named or "float16"))
    return load(path, base, load_in_4bit=load_4bit, load_in_8bit=load_8bit, **loading)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device: say cpu, cuda or cuda:1, for example.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here. Try --device cpu.")
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # not built in; or meta, which holds no numbers
        raise ValueError(f"--device {name} cannot compute here ({error}). Try --device cpu.") from error
    return device


def processor_source(path: str | os.PathLike, base: str | os.PathLike | None = None) -> str:
    """Where the processor of the checkpoint at `path` is: in it, where it was saved along, else with its base."""
    return str(path) if _has_processor(path) else base_of(path, base)


def _has_processor(path: str | os.PathLike) -> bool:
    return any((Path(path) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


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
    require("bitsandbytes", "quantized", "Quantised loading")
    return BitsAndBytesConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, **given)


def base_source(name: str) -> str:
    """Where the base called `name` is loaded from."""
    return str(base_folder()) if is_smol(name) else name


def original_class_name(base: str | os.PathLike) -> str | None:
    """The model class of a base in the original LLaVA's layout, None for another; found without importing `llava`.

    Raises:
        OSError, ValueError: there is no such base, or what is there is no model; the message names it.
    """
    from transformers import PretrainedConfig

    if Path(base).is_file():
        raise ValueError(f"{base} is a file, not the folder of a model.")
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ValueError(
            f"{base} is not the folder of a model: it has no config.json. Name the folder or hub name of a LLaVA."
        )
    try:
        with naming(base):
            config = PretrainedConfig.get_config_dict(base)[0]
        # early ones call themselves "llava", which is transformers' own today, but name their class
        named = [name for name in config.get("architectures") or [] if name in ORIGINAL.values()]
        return ORIGINAL.get(str(config.get("model_type"))) or (named[0] if named else None)
    except (AttributeError, TypeError, KeyError, RecursionError) as error:  # JSON, but of another form
        raise ValueError(f"The config.json of {base} is not the configuration of a model ({error}).") from error


def base_class_name(base: str | os.PathLike) -> str:
    """The name of the model class that the base is opened with, by which `host_class` knows it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    named = original_class_name(base)
    if named:
        return named
    config = AutoConfig.from_pretrained(base)
    mapping: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # a lazy one, whose types say little
    if type(config) not in mapping:
        raise ValueError(f"{base} is a {config.model_type}, which is no model for images and text: name a LLaVA.")
    return mapping[type(config)].__name__
