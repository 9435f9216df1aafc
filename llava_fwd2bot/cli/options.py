"""Options of every command that loads a model, and loading it.

torch and transformers are imported inside the functions, so that `fwd2bot --help` is immediate.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def number(kind: Callable[[str], Any], least: float, name: str, most: float = 2**31 - 1) -> Callable[[str], Any]:
    """The `type=` of an argument: a number from `least` to `most`, called `name` in errors."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value:
            raise argparse.ArgumentTypeError(f"must be {name} of at least {least}, got {text!r}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be {name} of at most {most:,}, got {text!r}")
        return value

    return convert


count = number(int, 1, "a whole number")


def model_options(k: bool = True, required: bool = True, json: bool = True) -> argparse.ArgumentParser:
    """The options of every command that loads a model.

    Args:
        k: with --k J. required: --model is required, as no cache names the model. json: include --json.
    """
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("model")
    model_help = "the Fwd2Bot checkpoint: a folder, a hub name or smol-llava"
    model_help += "" if required else "; default: the one that filled --cache"
    group.add_argument("--model", required=required, metavar="CKPT", help=model_help)
    group.add_argument("--base", metavar="PATH", help="the base, if it is no longer at the path in the checkpoint")
    width = group.add_mutually_exclusive_group()
    width.add_argument("--load-4bit", action="store_true", help="quantise the language model to 4 bits (NF4)")
    width.add_argument("--load-8bit", action="store_true", help="quantise the language model to 8 bits")
    group.add_argument("--device", help="cpu, cuda, cuda:1, …; default: cuda if available")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="precision; default: auto, the base's own")
    if k:
        group.add_argument("--k", type=count, metavar="J", help="use the first J summary tokens; default: all")
    if json:
        options.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return options


def exif_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exif-orientation",
        choices=("on", "off"),
        help="rotate images by their EXIF orientation; off: pixels as stored, as LLaVA reads them; default: on",
    )


def folder_of(name: str) -> Path:
    """The checkpoint's folder: `name` itself, smol-llava's, or a snapshot of the hub."""
    from ..hosts.opening import local_folder

    return local_folder(name, {})


def model_folders(args: argparse.Namespace) -> dict[str, str | None]:
    """What --model and --base name, for `refuse_overlap`: no output may overwrite them."""
    return {f"--{name}": getattr(args, name, None) for name in ("model", "base")}


def checked(name: str, *ks: int | None) -> tuple[Path, int]:
    """The checkpoint's folder and its k, after checking that it is a checkpoint and that each --k fits."""
    from ..checkpoint.read import read_checkpoint
    from ..compressors import check_prefix

    path = folder_of(name)
    config = read_checkpoint(path)["fwd2bot"]
    most = config.num_summary_tokens
    if not all(k is None or 1 <= k <= most for k in ks):
        raise ValueError(f"--k must be from 1 to this model's k = {most}, got {', '.join(map(str, ks))}.")
    for k in ks:
        check_prefix(config, k)
    return path, most


def warn_untrained(path: Path, k: int | None) -> None:
    """Warns about a --k that the checkpoint at `path` was not trained with."""
    from ..checkpoint.read import read_checkpoint
    from ..processing.answer import untrained_k

    warning = untrained_k(read_checkpoint(path)["fwd2bot"], k)
    if warning:
        warnings.warn(warning, stacklevel=1)


def load_model(path: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, processor) on the requested device and in the requested precision."""
    from ..checkpoint.load import load_for_inference
    from .console import quiet_bars

    quiet_bars()
    return load_for_inference(path, args.base, args.device, args.dtype, args.load_4bit, args.load_8bit)


def load_plain_model(path: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """Like `load_model`, for a LLaVA without Fwd2Bot: a base, or the output of `fwd2bot train` without --fwd2bot."""
    from ..checkpoint.load import load_for_inference, load_plain
    from .console import quiet_bars

    quiet_bars()
    return load_for_inference(path, args.base, args.device, args.dtype, args.load_4bit, args.load_8bit, load=load_plain)


@contextmanager
def json_alone(wanted: bool) -> Iterator[None]:
    """Context that sends everything printed to stderr if `wanted` (--json)."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def quantisation(args: argparse.Namespace) -> str | None:
    """The width of --load-4bit or --load-8bit, as caches and results name it."""
    return "4bit" if args.load_4bit else "8bit" if args.load_8bit else None
