"""A cache and the precision that reads it: a quantised model on a float model's summaries only when asked for."""

from __future__ import annotations

import argparse
from typing import Any

from .options import quantisation


def precision_option(parser: argparse.ArgumentParser) -> None:
    help = "with --cache: let a model read summaries that it made in another precision (float, 8 or 4 bit)"
    parser.add_argument("--mixed-precision", action="store_true", help=help)


def check_precision(args: argparse.Namespace, settings: Any, path: str | None = None) -> None:
    """Refuses a cache that was filled in another precision than --load-4bit or --load-8bit say, or their absence.

    The fingerprint does not tell: it is of the checkpoint, which is the same.

    Args:
        settings: of the cache. path: of the cache; default: --cache.

    Raises:
        ValueError: they differ, and there is no --mixed-precision; the message names both.
    """
    stored, requested = settings.quantised or None, quantisation(args)
    if stored == requested or getattr(args, "mixed_precision", False):
        return
    same = f"--load-{stored}" if stored else f"no --load-{requested}"
    way_out = " or allow it with --mixed-precision" if hasattr(args, "mixed_precision") else ""
    raise ValueError(
        f"{path or args.cache} was filled by a {stored or 'float'} model, and a {requested or 'float'} one would read "
        f"it: pass {same},{way_out or ' so that both are the same'}."
    )
