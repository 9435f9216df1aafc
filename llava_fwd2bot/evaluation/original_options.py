"""Fwd2Bot's additional arguments of the original LLaVA's evaluation programs; needs no LLaVA."""

from __future__ import annotations

import argparse


def eval_options() -> argparse.ArgumentParser:
    """The parser of Fwd2Bot's arguments; those of LLaVA's program are left over."""
    parser = argparse.ArgumentParser(
        prog="fwd2bot llava eval",
        usage="fwd2bot llava eval MODULE <its arguments> [--k J] [--from-cache FILE]",
        description="Run one of the original LLaVA's evaluation programs (llava/eval/MODULE.py), unchanged. "
        "Fwd2Bot adds: --model-path may be a Fwd2Bot checkpoint, and the two options below.",
        epilog="MODULE's own arguments follow it, such as --model-path, --question-file, --image-folder and "
        "--answers-file; its answers file is what LLaVA's scorers and `fwd2bot eval score` read.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "module", metavar="MODULE", help="model_vqa_loader, model_vqa, model_vqa_mmbench, model_vqa_science, …"
    )
    parser.add_argument("--k", type=int, metavar="J", help="answer from the first J summary tokens; default: all")
    parser.add_argument("--from-cache", metavar="FILE", help="summaries by `fwd2bot compress`, instead of the images")
    return parser
