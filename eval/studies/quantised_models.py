"""smol-llava in the precisions of quantised.py, and what a model takes in memory: counted, or by its layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from eval.shapes import LLAVA_7B
from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.config import Fwd2BotConfig
from llava_fwd2bot.hosts.llava import Fwd2BotLlava

FLOAT = "float32"  # what the others are compared with
BLOCK, BLOCK_OF_SCALES = 64, 256  # bitsandbytes' defaults: weights that share a scale, and scales that share one
PRECISIONS: dict[str, dict[str, Any]] = {
    FLOAT: {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "8-bit": {"dtype": torch.bfloat16, "load_in_8bit": True},
    "nf4": {"dtype": torch.bfloat16, "load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "nf4 double": {"dtype": torch.bfloat16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "torchao int8": {"dtype": torch.bfloat16},
}


def open_model(precision: str, checkpoint: str = "smol-llava") -> tuple[nn.Module, Any]:
    """The checkpoint's model with the language model's linear layers in `precision`, and its processor.

    Raises:
        ValueError: no such precision. ImportError: bitsandbytes or torchao is missing.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    loading = dict(PRECISIONS[precision])
    if precision == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        skip = list(Fwd2BotLlava.quantization_skip)
        loading["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)
    return load_fwd2bot(checkpoint, device_map={"": "cpu"}, **loading)


def bytes_of(module: nn.Module) -> int:
    """Bytes of all weights and buffers of a module, each once, with the scales and tables of quantised layers."""
    storages = {}
    for tensor in _tensors(module):
        if tensor.device.type == "meta":
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            if hasattr(tensor, "tensor_data_names"):  # torchao's
                yield from (getattr(tensor, name) for name in tensor.tensor_data_names)
            else:
                yield tensor
        state = getattr(getattr(part, "weight", None), "quant_state", None)  # bitsandbytes, 4 bits
        for level in (state, getattr(state, "state2", None)):
            yield from (x for x in vars(level).values() if isinstance(x, Tensor)) if level is not None else ()
        for owner in (getattr(part, "weight", None), getattr(part, "state", None)):  # bitsandbytes, 8 bits
            for name in ("CB", "SCB"):
                if isinstance(getattr(owner, name, None), Tensor):
                    yield getattr(owner, name)


def bytes_nf4(weights: int, double: bool = True) -> int:
    """Bytes of one matrix of so many weights as bitsandbytes' Linear4bit stores it, with scales and tables."""
    scales = math.ceil(weights / BLOCK)
    table = 16 * 4  # the sixteen values of NF4
    if not double:
        return math.ceil(weights / 2) + 4 * scales + table
    return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / BLOCK_OF_SCALES) + 4 + 256 * 4 + table


def llava_7b() -> nn.Module:
    """LLaVA-1.5-7B's shape on the meta device: no weight is made."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        return LlavaForConditionalGeneration(LLAVA_7B.config())


def bytes_of_shape(model: nn.Module, lora_r: int, bits: int, double: bool = True, tower: bool = False) -> int:
    """Bytes of a LLaVA and both stages' adapters, float parts in bfloat16.

    Args:
        lora_r: rank of each adapter; 0 for none. bits: 16, or 4 for the language model's linear layers.
        tower: with 4 bits: the vision tower's linear layers as well.
    """
    targets, total = Fwd2BotConfig().lora_targets, 0
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inside = {n for n in linear if ".language_model.layers." in f".{n}"}
    packed = inside | {n for n in linear if tower and "vision_tower" in n}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        is_packed = bits == 4 and kind == "weight" and owner in packed
        total += bytes_nf4(parameter.numel(), double) if is_packed else 2 * parameter.numel()
    adapted = [linear[n] for n in inside if n.rpartition(".")[2] in targets]
    return total + 2 * 2 * lora_r * sum(m.in_features + m.out_features for m in adapted)  # two stages, two bytes
