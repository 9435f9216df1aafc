"""`fwd2bot compressors`: the ways to make k tokens of an image's dense tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .parser import Parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="fwd2bot compressors",
        description="List the ways to make k tokens of an image's dense tokens. `fwd2bot train --fwd2bot_compressor "
        "NAME` trains the answer pass on any of them, with the same data, losses and checkpoints.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list, for programs")
    options = parser.parse_args(argv)

    from ..compressors import compressors

    rows = [
        {
            "name": c.name,
            "pass": c.runs_language_model,
            "text search": c.compares_texts,
            "prefixes": c.prefix,
            "most tokens": c.max_tokens,
            "makes": c.about,
            "source": c.source,
        }
        for c in compressors().values()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':{width}}  pass  text search  prefixes  makes (source)")
    for row in rows:
        pass_, search, prefixes = ("yes" if row[name] else "no" for name in ("pass", "text search", "prefixes"))
        print(f"{row['name']:{width}}  {pass_:4}  {search:11}  {prefixes:8}  {row['makes']} ({row['source']})")
    print(
        "\npass: an image costs a pass of the language model. text search: texts have summaries too. prefixes: the "
        "first j tokens are the summary of j tokens."
    )
