"""What the speed benchmarks share: shapes, random models that need no download, timing in turn, memory, and printing.

A figure taken alone says little on a machine that others use as well, so the figures that count here are ratios of
sides that ran in turn, in one process, round by round.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
import transformers
from bench_shapes import CAPTION_TOKENS, LABELLED, PROMPT_TOKENS, SHAPES, SYSTEM_TOKENS, Shape
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from eval.measure import MALLOC, PeakMemory, environment, in_turn, quartiles, ratio, summarize
from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot

# for the benchmarks beside this file
__all__ = ["CAPTION_TOKENS", "LABELLED", "MALLOC", "PROMPT_TOKENS", "SHAPES", "PeakMemory", "Shape"]
__all__ += ["environment", "in_turn", "quartiles", "ratio", "summarize"]


# ---------------------------------------------------------------------- models and data
def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A LlavaForConditionalGeneration of this shape with random weights, made where it is to run."""
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(shape.config(), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # random weights must not end an answer early
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A copy on the very same weights: what is added to one of them is not on the other, and 7B is in memory once."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def with_fwd2bot(model: nn.Module, k: int, lora_r: int) -> nn.Module:
    def tokenize(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(range(3, 3 + PROMPT_TOKENS))}

    return add_fwd2bot(model, Fwd2BotConfig(num_summary_tokens=k, lora_r=lora_r, lora_alpha=2 * lora_r), tokenize)


def with_lora(model: nn.Module, lora_r: int) -> nn.Module:
    """The host's own LoRA fine-tune by PEFT, of the same rank on the same layers as Fwd2Bot's adapters."""
    layers = "|".join(Fwd2BotConfig().lora_targets)
    target = rf"(.*\.)?language_model\.layers\.\d+\.(.*\.)?({layers})"
    return get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, lora_dropout=0.0, target_modules=target))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def batch_of(
    shape: Shape, rows: int, text_tokens: int, device: torch.device, dtype: torch.dtype, captions: bool = False
) -> dict[str, Tensor]:
    """A standard batch as processors make it: one image a row, of n placeholders, text before and behind it.

    All rows are of one length. That is kind to the host, which would otherwise have to build attention masks.
    """
    generator = torch.Generator().manual_seed(1)
    n = shape.dense_tokens

    def words(length: int) -> Tensor:
        return torch.randint(3, shape.vocab - 1, (rows, length), generator=generator)

    before = min(SYSTEM_TOKENS, text_tokens // 2)
    image = torch.full((rows, n), shape.vocab - 1)
    ids = torch.cat([words(before), image, words(text_tokens - before)], dim=1)
    labels = ids.clone()
    labels[:, : ids.shape[1] - int(LABELLED * text_tokens)] = -100
    pixels = torch.randn(rows, 3, shape.image_size, shape.image_size, generator=generator).to(dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}
    if captions:
        batch["caption_input_ids"] = words(CAPTION_TOKENS)
        batch["caption_attention_mask"] = torch.ones_like(batch["caption_input_ids"])
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ---------------------------------------------------------------------- command line
def parser(description: str, shape: str = "toy") -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    cuda = torch.cuda.is_available()
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default=shape, help="7b wants a GPU of 40 GB")
    options.add_argument("--lora-r", type=int, help="default: the same share of the width as 64 of 4096")
    options.add_argument("--device", type=torch.device, default=torch.device("cuda" if cuda else "cpu"))
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    options.add_argument("--threads", type=int, default=1, help="on CPU; more wait for what else runs there")
    options.add_argument("--seconds", type=float, help="begin nothing new after so long; what is left out is named")
    options.add_argument("--json", action="store_true", help="end with one line of JSON")
    options.add_argument("--output", type=Path, help="write the JSON there as well")
    return options


def prepare(options: argparse.Namespace) -> tuple[Shape, torch.dtype]:
    """Fills in the defaults that depend on other options, and sets the threads."""
    shape = SHAPES[options.shape]
    options.lora_r = options.lora_r or shape.lora_r
    options.dtype = options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    return shape, getattr(torch, options.dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """As the Trainer does with --bf16: adapters are float32 in memory, products are in bfloat16."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def shape_facts(shape: Shape, text_tokens: int) -> dict[str, Any]:
    """Sizes and shares, and 7B's shares beside them."""
    return {
        "sizes": dataclasses.asdict(shape),
        "shares": shape.shares(text_tokens),
        "shares_7b": SHAPES["7b"].shares(SHAPES["7b"].text_tokens),
    }


class Clock:
    """The time that `--seconds` leaves."""

    def __init__(self, seconds: float | None) -> None:
        self.until = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        return None if self.until is None else max(self.until - time.monotonic(), 0.0)

    def share(self, part: float) -> float | None:
        return None if self.until is None else self.left() * part

    def over(self) -> bool:
        return self.left() == 0


def clocked(side: Callable[[], Any], into: list[float]) -> Callable[[], None]:
    """A side that notes the processor time it took, which neighbours on the machine touch less."""

    def run() -> None:
        start = time.process_time()
        side()
        into.append(time.process_time() - start)

    return run


def peak_of(side: Callable[[], Any], device: torch.device, times: int = 1) -> dict[str, Any]:
    """Memory before a side runs, and at its highest while it does, of the worst of several times."""
    memory, before, peak = PeakMemory(device), 0, 0
    for _ in range(times):
        memory.reset()
        before = max(before, memory.now())
        side()
        peak = max(peak, memory.peak())
    return {"before": before, "peak": peak, "exact": memory.exact}


def achieved(operations: float, size: float, seconds: float) -> dict[str, float]:
    """Counted operations and bytes over the time that they took."""
    return {"tflops": operations / seconds / 1e12, "gb_per_s": size / seconds / 1e9}


def free(device: torch.device) -> None:
    """Gives back what a measurement left, so that the next one has the whole memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes what there is so far to `--output`: whoever ends this process still finds it."""
    if options.output:
        beside = options.output.with_name(options.output.name + ".new")
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, options.output)


def finish(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    result["environment"] = environment(options.device)
    write(result, options)
    if options.json:
        print(json.dumps(result), flush=True)
    return result


def table(header: list[str], rows: list[list[Any]]) -> None:
    cells = [header, *([f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(row[0].ljust(widths[0]), *rest, sep="  ")
