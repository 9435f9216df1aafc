"""`fwd2bot search`: its parser; what it does is in cache.py."""

from __future__ import annotations

from collections.abc import Sequence

from .cache import add_search
from .options import count, model_options
from .parser import Parser


def main(argv: Sequence[str]) -> int | None:
    commands = Parser(prog="fwd2bot").add_subparsers(parser_class=Parser)
    add_search(commands, {"parents": [model_options(k=False, required=False)]}, count)
    args = commands.choices["search"].parse_args(argv)
    return args.run(args)
