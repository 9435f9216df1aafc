"""What the speed benchmarks share: shapes, random models that need no download, timing in turn, memory, and printing.

A figure taken alone says little on a machine that others use as well, so the figures that count here are ratios of
sides that ran in turn, in one process, round by round.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot
from llava_fwd2bot.evaluation.measure import MALLOC, PeakMemory, environment, in_turn, quartiles, ratio, summarize

__all__ = ["MALLOC", "PeakMemory", "in_turn", "quartiles", "ratio", "summarize"]  # for the benchmarks beside this file

PROMPT_TOKENS = 10  # "Summarize the image in a few words." with Llama's tokenizer, its space in front included
SYSTEM_TOKENS = 35  # LLaVA v1's system prompt and "USER: ", before the image
LABELLED = 0.5  # share of the text that is answers
CAPTION_TOKENS = 30


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA, and the text and the LoRA rank that go with them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch: int
    text_tokens: int
    lora_r: int  # the same share of the width in every shape: 64 of 4096, the package's default on 7B

    @property
    def dense_tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    def config(self) -> LlavaConfig:
        return LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_hidden,
                intermediate_size=self.vision_intermediate,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_heads,
                image_size=self.image_size,
                patch_size=self.patch,
            ),
            text_config=LlamaConfig(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                vocab_size=self.vocab,
                max_position_embeddings=4096,
            ),
            image_token_id=self.vocab - 1,
            image_seq_length=self.dense_tokens,
        )

    # ------------------------------------------------------------------ operations, counted by hand
    def _tower(self) -> float:
        tokens, width = self.dense_tokens + 1, self.vision_hidden
        weights = self.vision_layers * (4 * width**2 + 2 * width * self.vision_intermediate)
        return 2 * tokens * weights + self.vision_layers * 4 * tokens**2 * width

    def _layers(self, tokens: int) -> float:
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
        return 2 * tokens * weights + self._attention(tokens)

    def _attention(self, tokens: int) -> float:
        return self.layers * 2 * tokens**2 * self.hidden  # two products, of which the causal mask leaves half

    def _head(self, tokens: int) -> float:
        return 2 * tokens * self.hidden * self.vocab

    def shares(self, text_tokens: int) -> dict[str, float]:
        """Of the base's forward operations on n dense tokens and the text, what each part takes."""
        tokens = self.dense_tokens + text_tokens
        layers, head, tower = self._layers(tokens), self._head(tokens), self._tower()
        total = layers + head + tower
        return {
            "head_of_language_model": head / (layers + head),
            "vision_tower": tower / total,
            "attention": self._attention(tokens) / total,
        }

    def step_operations_ratio(self, text_tokens: int, k: int, checkpointing: bool) -> float:
        """What the operations alone make one expect of a training step with Fwd2Bot over one without; LoRA left out.

        Backward through frozen weights costs one forward more, checkpointing another one; the tower has no backward.
        """
        n, passes = self.dense_tokens, 3 if checkpointing else 2
        host = self._tower() + passes * self._layers(n + text_tokens) + 2 * self._head(n + text_tokens)
        layers = self._layers(n + PROMPT_TOKENS + k) + self._layers(k + text_tokens)
        return (self._tower() + passes * layers + 2 * self._head(int(LABELLED * text_tokens))) / host


SHAPES = {
    # LLaVA-1.5's proportions at a width a CPU can train: n and the text are the real ones, and the vocabulary and the
    # tower are cut until head and tower take the share they take of 7B, so that logits we save do not flatter us
    "toy": Shape(512, 1376, 8, 8, 1024, 192, 768, 2, 3, 336, 14, 200, 8),
    "7b": Shape(4096, 11008, 32, 32, 32064, 1024, 4096, 24, 16, 336, 14, 200, 64),
    "tiny": Shape(64, 128, 2, 4, 128, 64, 128, 2, 2, 48, 8, 24, 4),  # for the tests, in a second
}


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


def finish(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    result["environment"] = environment(options.device)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result), flush=True)
    return result


def table(header: list[str], rows: list[list[Any]]) -> None:
    cells = [header, *([f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(row[0].ljust(widths[0]), *rest, sep="  ")
