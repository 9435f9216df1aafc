"""`fwd2bot search`, and the search behind `fwd2bot ask --cache`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from .options import checked, count, load_model, model_options
from .parser import Parser
from .precision import check_precision, precision_option


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    run_search(args)


def _parser() -> Parser:
    about = "Search the images of a cache by text or by an image."
    search = Parser(prog="fwd2bot search", description=about, parents=[model_options(k=False, required=False)])
    search.add_argument("text", nargs="?", help="the query; without one, queries are read from the terminal")
    search.add_argument("--cache", required=True, metavar="PATH", help="a cache of `fwd2bot compress --cache`")
    search.add_argument("--image", metavar="FILE", help="find images similar to this one")
    search.add_argument("--id", metavar="ID", help="find images similar to this one of the cache")
    search.add_argument("--queries", metavar="FILE", help="one query per line of a text file, or - for stdin")
    search_options(search, count, top=10)
    search.add_argument("--paths", action="store_true", help="print only the paths, one per line")
    search.add_argument("-0", dest="nul", action="store_true", help="with --paths: end each with NUL, for xargs -0")
    search.add_argument("--html", metavar="FILE", help="write a page of thumbnails")
    search.add_argument("--open", action="store_true", help="open the page of thumbnails in the browser")
    search.set_defaults(parser=search)
    return search


def search_options(parser: argparse.ArgumentParser, count: Any, top: int) -> None:
    parser.add_argument("--top", type=count, default=top, metavar="N", help=f"default: {top}")
    parser.add_argument(
        "--filter", metavar="SQL", help="a condition on the columns, e.g. \"width > 1000 AND id LIKE 'a/%%'\""
    )
    parser.add_argument("--exact", action="store_true", help="compare with every image, without the index")
    precision_option(parser)


def run_search(args: argparse.Namespace) -> None:
    from ..cache.index import missing
    from ..cache.naming import fingerprint_of
    from ..cache.nearest import EXACT_BELOW
    from ..cache.reader import SummaryCache
    from ..cache.tables import COLUMNS

    given = [x for x in (args.text, args.image, args.id, args.queries) if x is not None]
    interactive = not given and sys.stdin is not None and sys.stdin.isatty()
    if len(given) > 1 or not (given or interactive):
        args.parser.error('give one of "words", --image FILE, --id ID and --queries FILE')
    if args.queries and (args.html or args.open):
        args.parser.error("--html and --open require a single query")
    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        cache = SummaryCache.open(args.cache)
        if args.id is None:
            path, _ = checked(args.model or model_of(args.cache))
            cache = SummaryCache.open(args.cache, fingerprint_of(path))
            check_precision(args, cache.settings)
            loaded = load_model(path, args)
        else:
            loaded = None
        if hasattr(cache, "users_columns") and not args.exact and (warning := missing(cache, EXACT_BELOW)):
            print(f"fwd2bot: {warning}", file=sys.stderr)
        columns = [*COLUMNS, *getattr(cache, "users_columns", ())]
    for text in _queries(args, interactive):
        with ExitStack() as stack:
            if args.json:
                stack.enter_context(redirect_stdout(sys.stderr))
            try:
                hits, sheet = _one(args, cache, loaded, text, columns)
            except ValueError as error:
                if not (interactive or args.queries):
                    raise
                print(f"fwd2bot: {error}", file=sys.stderr)
                continue
        _show(args, text, hits, sheet)
    if args.open and sheet:
        import webbrowser

        webbrowser.open(Path(sheet).absolute().as_uri())


def _queries(args: argparse.Namespace, interactive: bool) -> Iterator[str | None]:
    if interactive:
        while True:
            try:
                text = input("search: ")
            except EOFError:
                return
            if text.strip():
                yield text
    elif args.queries == "-":
        yield from (line.strip() for line in sys.stdin if line.strip())
    elif args.queries:
        lines = Path(args.queries).read_text(encoding="utf-8-sig").splitlines()
        yield from (line.strip() for line in lines if line.strip())
    else:
        yield args.text


def _one(
    args: argparse.Namespace, cache: Any, loaded: Any, text: str | None, columns: list[str]
) -> tuple[list[dict[str, Any]], Path | None]:
    """The hits of one query, and the contact sheet if requested."""
    from ..cache import search as finder

    k = cache.settings.k
    if args.id is not None:
        query = cache.get([args.id])[0]
    elif args.image is not None:
        query = finder.summary_of_image(*loaded, args.image, k, cache.settings.reading)
    else:
        query = finder.summary_of_text(*loaded, text, k)
    # copies of a file become one hit, so a few more are fetched
    hits = finder.search(cache, query, args.top + 20, args.filter, args.exact or None, columns)
    hits = finder.distinct(hits)[: args.top]
    if not (args.html or args.open):
        return hits, None
    name = args.html or str(Path(args.cache).absolute().with_suffix(".search.html"))
    return hits, finder.contact_sheet(hits, text or args.image or args.id, name)


def _show(args: argparse.Namespace, text: str | None, hits: list[dict[str, Any]], sheet: Path | None) -> None:
    from ..cache.naming import escaped
    from ..cache.search import table

    query = text or args.image or args.id
    if args.json:
        print(json.dumps({"query": query, "hits": hits, "html": sheet and str(sheet)}, default=str))
    elif args.paths:
        for hit in hits:
            plain = args.nul or not sys.stdout.isatty()
            print(hit["source"] if plain else escaped(hit["source"]), end="\0" if args.nul else "\n")
    else:
        if args.queries:
            print(f"{escaped(query)}:")
        print(table(hits) if hits else "Nothing was found.")
    if sheet and not args.json:
        print(f"fwd2bot: the page is {sheet}", file=sys.stderr)


def model_of(path: str) -> str:
    """The checkpoint that filled the cache; raises ValueError if it is unknown."""
    from ..cache.reader import SummaryCache

    model = SummaryCache.open(path).settings.model
    if not model:
        raise ValueError(f"{path} does not record the model that filled it: give --model.")
    return model


def summaries_for_answer(args: argparse.Namespace, path: Path) -> tuple[list[str], Any]:
    """For `fwd2bot ask --cache`: ids, their summaries [M, k, D], and the model if it had to be loaded."""
    from ..cache.naming import fingerprint_of
    from ..cache.reader import SummaryCache

    cache = SummaryCache.open(args.cache, fingerprint_of(path))
    check_precision(args, cache.settings)
    if args.id:
        return args.id, (cache.get(args.id, args.k), None)
    loaded = load_model(path, args)
    ids = [hit["id"] for hit in hits_for_answer(args, cache, *loaded, args.search)]
    return ids, (cache.get(ids, args.k), loaded)


def hits_for_answer(
    args: argparse.Namespace, cache: Any, model: Any, processor: Any, words: str
) -> list[dict[str, Any]]:
    """The images that `ask` is about after a search; ValueError where nothing is found."""
    from ..cache import search as finder

    query = finder.summary_of_text(model, processor, words, cache.settings.k)
    columns = ["sha256", "source", "width", "height"]
    hits = finder.search(cache, query, args.top, args.filter, args.exact or None, columns)
    if not hits:
        raise ValueError(f"{args.cache}: nothing was found for {words!r}. Is the cache empty, or --filter too strict?")
    return hits
