"""`fwd2bot train`: its arguments are LLaVA's and transformers' own, and are read by their parser."""

from __future__ import annotations

from collections.abc import Sequence

from .console import quiet_bars


def main(argv: Sequence[str]) -> None:
    from ..training.command import train

    quiet_bars()
    train(argv)
