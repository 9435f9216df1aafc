"""`fwd2bot convert`: convert a checkpoint between the original LLaVA's layout and transformers'."""

from __future__ import annotations

from collections.abc import Sequence

from .options import folder_of
from .parser import Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="fwd2bot convert", description="Convert between the layouts of LLaVA and transformers.")
    parser.add_argument("checkpoint", metavar="CKPT", help="the Fwd2Bot checkpoint")
    parser.add_argument("--base", required=True, metavar="PATH", help="the same LLaVA in the other layout")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    args = parser.parse_args(argv)
    from ..checkpoint.convert import convert

    print(convert(folder_of(args.checkpoint), args.base, args.output))
