"""`fwd2bot cache …`: inspect, verify, repair, clean up, merge and export a cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any

from ..cache.remembered import recall
from .options import checked, load_model, model_options, number
from .parser import Parser
from .precision import check_precision

KINDS = ("safetensors", "parquet", "numpy", "faiss")


def add_cache(commands: Any) -> None:
    names = "ls, stats, verify, repair, optimize, prune, rm, restore, skipped, dedup, export, merge, index, …"
    cache = commands.add_parser("cache", help=names, allow_abbrev=False)
    actions = cache.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, help: str, aliases: tuple[str, ...] = (), parents: Any = ()) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=help, aliases=aliases, parents=parents, allow_abbrev=False)
        parser.add_argument("cache", metavar="PATH", help="the cache")
        if not parents:
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(run=run_cache, action=name, parser=parser)
        return parser

    ls = action("ls", "list the images, one per line")
    ls.add_argument("--filter", metavar="SQL", help="images that match a condition")
    ls.add_argument("--paths", action="store_true", help="print only the paths")
    ls.add_argument("-0", dest="nul", action="store_true", help="with --paths: end each path with NUL")
    action("skipped", "list the files that could not be used, with the reason")
    action("stats", "print the number of rows and the bytes per image")
    action("verify", "read every row and check it; exit code 1 on any fault")
    repair = action("repair", "remove damaged rows, compress their images again", parents=[model_options(False, False)])
    repair.add_argument("--no-compress", action="store_true", help="only mark the images for the next compress")
    optimize = action("optimize", "remove unused summaries and old versions, and join small files", aliases=("vacuum",))
    hours = "remove versions older than this; processes that read one will fail; default: 1"
    optimize.add_argument(
        "--older-than", type=number(float, 0, "a number", 1e6), default=1.0, metavar="HOURS", help=hours
    )
    rm = action("rm", "remove images by id, path, folder/ or --filter; image files are kept")
    rm.add_argument("names", nargs="*", metavar="ID", help="an id or a path as `cache ls` prints it, or a path here")
    rm.add_argument("--filter", metavar="SQL", help="images that match a condition")
    prune = action("prune", "remove images whose file no longer exists")
    prune.add_argument("--missing-roots", action="store_true", help="also if the whole folder is missing")
    for parser in (rm, prune):
        parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
        parser.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    restore = action("restore", "undo rm or prune: restore an earlier version; without --version: list the versions")
    restore.add_argument("--version", type=int, metavar="N", help="the version to restore")
    dedup = action("dedup", "list files of the same bytes; with --near also similar images")
    dedup.add_argument("--near", type=float, metavar="COSINE", help="also pairs of at least this cosine, e.g. 0.97")
    export = action("export", "write one file for other programs")
    export.add_argument("--output", required=True, metavar="FILE")
    export.add_argument("--to", choices=KINDS, default="safetensors", help="default: safetensors, as `compress` writes")
    export.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    metadata = action("import-metadata", "add your own columns from a .csv or .parquet file, for --filter")
    metadata.add_argument(
        "file", nargs="?", metavar="FILE", help="a table whose column id, path, file or source identifies the image"
    )
    metadata.add_argument("--exif", action="store_true", help="read time, camera and place from the files again")
    merge = action("merge", "add the images of other caches of the same model")
    merge.add_argument("others", nargs="+", metavar="OTHER")
    index = action("index", "build the search index, which is used from 100,000 images on")
    index.add_argument("--kind", choices=("ivf_rq", "hnsw_sq", "ivf_pq"), default="ivf_rq", help="default: ivf_rq")
    action("migrate", "convert a cache of an earlier format")


def run_cache(args: argparse.Namespace) -> int:
    if args.action == "stats" and (kept := recall(args.cache)):
        print(json.dumps(kept, indent=2) if args.json else lines(kept))
        return 0
    from ..cache import actions

    if args.action in ("ls", "skipped", "dedup"):
        return _list(args)
    if args.action == "restore" and args.version is None and not args.json:
        print("\n".join(actions.run(args)["versions"]) or "There is no earlier version.")
        return 0
    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        if args.action in ("rm", "prune") and not _confirmed(args):
            return 1
        found = actions.run(args)
        if args.action == "repair" and found["lost"] and not args.no_compress:
            found |= _compress_again(args)
    print(json.dumps(found, indent=2, default=str) if args.json else lines(found))
    return 0 if found.get("ok", True) else 1


def _list(args: argparse.Namespace) -> int:
    """Prints rows as they are read; with --json one object per line."""
    from ..cache import actions
    from ..cache.naming import escaped

    for row in actions.listed(args):
        if args.json:
            print(json.dumps(row, default=str))
        elif getattr(args, "paths", False):
            plain = args.nul or not sys.stdout.isatty()
            print(row["source"] if plain else escaped(row["source"]), end="\0" if args.nul else "\n")
        else:
            print(escaped("\t".join(str(value) for value in row.values() if value is not None)).replace("\\t", "\t"))
    return 0


def _confirmed(args: argparse.Namespace) -> bool:
    """Lists what would be removed and asks for confirmation; without a terminal, --yes is required."""
    from ..cache import actions
    from ..cache.naming import escaped

    args.chosen = actions.chosen_to_go(args)
    if args.dry_run or not (args.yes or not args.chosen):
        for source in args.chosen[:20]:
            print(escaped(source), file=sys.stderr)
        more = len(args.chosen) - 20
        print(f"{f'and {more:,} more: ' if more > 0 else ''}{len(args.chosen):,} would be removed", file=sys.stderr)
    if args.yes or not args.chosen or args.dry_run:
        return True
    if not (sys.stdin and sys.stdin.isatty()):
        args.parser.error("no terminal to confirm on: pass --yes, or --dry-run to list what would be removed")
    return input("Remove them? [y/N] ").strip().lower() in ("y", "yes")


def _compress_again(args: argparse.Namespace) -> dict[str, Any]:
    from ..cache.compressor import Compressor
    from ..cache.naming import fingerprint_of
    from ..cache.pipeline import Later, fill
    from ..cache.reader import SummaryCache
    from ..cache.repair import lost_entries
    from .search import model_of

    path, _ = checked(args.model or model_of(args.cache))
    cache = SummaryCache.open(args.cache, fingerprint_of(path))
    settings = cache.settings
    check_precision(args, settings)
    own = {"reading": settings.reading, "fast": settings.decoding == "fast"}
    later = Later(lambda: Compressor(*load_model(path, args), settings.k, **own), 8)
    done = fill(cache, lost_entries(cache), later)
    still = [entry.id for entry in lost_entries(cache)]
    return {"compressed": done.compressed, "renamed": done.renamed, "lost": still}


def lines(found: dict[str, Any]) -> str:
    """Results as text, one per line; of a list the first five values."""
    from ..cache.naming import escaped

    shown = []
    for name, value in found.items():
        if isinstance(value, list):
            more = f" and {len(value) - 5} more" if len(value) > 5 else ""
            value = ", ".join(map(str, value[:5])) + more if value else "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {x:,}" if isinstance(x, int) else f"{key} {x}" for key, x in value.items())
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        elif value is None:
            value = "none"
        shown.append(f"{name.replace('_', ' '):<26} {escaped(str(value))}")
    return "\n".join(shown)


def main(argv: Sequence[str]) -> int | None:
    """`fwd2bot cache …`."""
    commands = Parser(prog="fwd2bot").add_subparsers(parser_class=Parser)
    add_cache(commands)
    args = commands.choices["cache"].parse_args(argv)
    return args.run(args)
