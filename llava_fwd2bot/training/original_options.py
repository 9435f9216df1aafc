"""What Fwd2Bot adds to the arguments of the original LLaVA's train(); read without LLaVA."""

from __future__ import annotations

import argparse
import dataclasses

from ..files.check import ON_BAD_IMAGE
from .arguments import Fwd2BotArguments


def train_options() -> argparse.ArgumentParser:
    """Ours beside the arguments of LLaVA's `train()`."""
    parser = argparse.ArgumentParser(
        prog="fwd2bot llava train",
        usage="fwd2bot llava train <LLaVA's arguments> [--fwd2bot K] [--fwd2bot_… VALUE]",
        description="The original LLaVA's train(), with its parser, data and loop. Without --fwd2bot nothing changes. "
        "With it, the model is trained with K summary tokens, and LoRA is one adapter for each of the two passes.",
        epilog="LLaVA's own arguments are those of its llava/train/train.py: --model_name_or_path, --data_path, "
        "--image_folder, --output_dir, --version, …",
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group("what Fwd2Bot adds")
    for field in dataclasses.fields(Fwd2BotArguments):
        kind = next(k for k in (int, float, str) if k.__name__ in str(field.type))
        value = "K" if field.name == "fwd2bot" else kind.__name__.upper()
        group.add_argument(f"--{field.name}", type=kind, metavar=value, help=field.metadata.get("help"))
    group.add_argument("--lora_enable", nargs="?", const="True", default="False", help="LLaVA's; read here with it")
    group.add_argument("--on_bad_image", choices=ON_BAD_IMAGE, default="raise", help="missing or damaged images")
    group.add_argument("--attn_implementation", help="LLaVA's train_mem.py says flash_attention_2")
    return parser
