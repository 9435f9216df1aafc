"""`fwd2bot search`, `fwd2bot cache …`, and what `compress` and `ask` do with --cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import checked, load_model, number, quantisation, warn_untrained
from .parser import Parser

if TYPE_CHECKING:
    from ..files.images import Reading

DEFAULT_CODEC = "float16"


def add_search(commands: Any, shared: dict[str, Any], count: Any) -> None:
    search = commands.add_parser("search", help="find images of a cache by words or by an image", **shared)
    search.add_argument("text", nargs="?", help="what to look for")
    search.add_argument("--cache", required=True, metavar="PATH", help="the cache, of `fwd2bot compress --cache`")
    search.add_argument("--image", metavar="FILE", help="look for images like this one")
    search.add_argument("--id", metavar="ID", help="look for images like this one of the cache")
    search_options(search, count, top=10)
    search.add_argument("--html", metavar="FILE", help="write a contact sheet, with small pictures")
    search.add_argument("--open", action="store_true", help="show the contact sheet in the browser")
    search.set_defaults(run=run_search, parser=search)


def search_options(parser: argparse.ArgumentParser, count: Any, top: int) -> None:
    parser.add_argument("--top", type=count, default=top, metavar="N", help=f"default: {top}")
    parser.add_argument(
        "--filter", metavar="SQL", help="a condition on the columns, e.g. \"width > 1000 AND id LIKE 'a/%%'\""
    )
    parser.add_argument("--rerank", choices=("maxsim",), help="order the best by all summary tokens")
    parser.add_argument("--exact", action="store_true", help="compare with every image, also where there is an index")


def add_cache(commands: Any) -> None:
    cache = commands.add_parser("cache", help="verify, stats, export, merge, vacuum, prune, index", allow_abbrev=False)
    actions = cache.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=help, allow_abbrev=False)
        parser.add_argument("cache", metavar="PATH", help="the cache")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(run=run_cache, action=name)
        return parser

    action("verify", "read every row and check it; exit code 1 on any fault")
    action("stats", "rows, and bytes per image")
    export = action("export", "to the safetensors file of `compress --output`")
    export.add_argument("--output", required=True, metavar="FILE")
    export.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    merge = action("merge", "add the images of other caches of the same model")
    merge.add_argument("others", nargs="+", metavar="OTHER")
    vacuum = action("vacuum", "join small files, update the index, remove old versions")
    hours = "age of the versions to remove; whoever reads one of them fails; default: 1"
    vacuum.add_argument(
        "--older-than", type=number(float, 0, "a number", 1e6), default=1.0, metavar="HOURS", help=hours
    )
    action("prune", "take out images whose file is not there any more")
    action("index", "build the index over the vectors anew")


def run_cache(args: argparse.Namespace) -> int:
    from ..cache import maintenance as tools
    from ..cache.reader import SummaryCache
    from ..cache.summary_file import check_output
    from ..files.outputs import refuse_overlap

    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        cache = SummaryCache.open(args.cache)
        if args.action == "export":
            refuse_overlap("--output", args.output, models={"the cache": args.cache})
            found = tools.export(cache, check_output(args.output, args.overwrite))
        elif args.action == "merge":
            others = [SummaryCache.open(other, cache.settings.fingerprint) for other in args.others]
            found = {"added": sum(tools.merge(cache, other)["added"] for other in others), "rows": len(cache)}
        elif args.action == "vacuum":
            found = tools.vacuum(cache, args.older_than)
        else:
            found = getattr(tools, args.action)(cache)
    print(json.dumps(found, indent=2) if args.json else _lines(found))
    return 0 if found.get("ok", True) else 1


def _lines(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, list):
            more = f" and {len(value) - 5} more" if len(value) > 5 else ""
            value = ", ".join(map(str, value[:5])) + more if value else "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {x:,}" for key, x in value.items())
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        lines.append(f"{name.replace('_', ' '):<26} {value}")
    return "\n".join(lines)


def run_search(args: argparse.Namespace) -> None:
    from ..cache import search as finder
    from ..cache.reader import SummaryCache
    from ..cache.summary_file import fingerprint_of

    if sum(x is not None for x in (args.text, args.image, args.id)) != 1:
        args.parser.error('give one of "words", --image FILE and --id ID')
    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        args.model = args.model or model_of(args.cache)
        path, _ = checked(args.model)
        cache = SummaryCache.open(args.cache, fingerprint_of(path))
        k = cache.settings.k
        if args.id is not None:
            query = cache.get([args.id])[0]
        else:
            model, processor = load_model(path, args)
            if args.image is not None:
                query = finder.summary_of_image(model, processor, args.image, k, cache.settings.reading)
            else:
                query = finder.summary_of_text(model, processor, args.text, k)
        hits = finder.search(cache, query, args.top, args.filter, args.exact or None, args.rerank == "maxsim")
        sheet = None
        if args.html or args.open:
            name = args.html or str(Path(args.cache).absolute().with_suffix(".search.html"))
            sheet = finder.contact_sheet(hits, args.text or args.image or args.id, name)
    for hit in hits:
        hit["added"] = str(hit["added"])
    if args.json:
        print(json.dumps({"query": args.text or args.image or args.id, "hits": hits, "html": sheet and str(sheet)}))
    else:
        print(finder.table(hits) if hits else "Nothing was found.")
    if args.open:
        import webbrowser

        webbrowser.open(Path(sheet).absolute().as_uri())


def model_of(path: str) -> str:
    """The checkpoint that filled the cache; ValueError where it is not known."""
    from ..cache.reader import SummaryCache

    model = SummaryCache.open(path).settings.model
    if not model:
        raise ValueError(f"{path} does not say which model filled it: give --model.")
    return model


def compress_into_cache(args: argparse.Namespace) -> dict[str, Any]:
    """`fwd2bot compress --cache`: the figures of the run."""
    from ..cache.compressor import Compressor
    from ..cache.fill import Filled, fill, watch
    from ..cache.format import CacheSettings
    from ..cache.ray_fill import fill_by_ray
    from ..cache.reader import SummaryCache
    from ..cache.summary_file import find_images, fingerprint_of
    from ..config import CONFIG_NAME, read_json
    from ..files.outputs import refuse_overlap

    models = {"--model": args.model, "--base": args.base}
    folders = {f"--images {name}": name for name in args.images if Path(name).is_dir()}
    refuse_overlap("--cache", args.cache, models=models, images=folders, inside_images=True)
    left_out: Counter[str] = Counter()
    images, refused = find_images(args.images, args.watch is not None, left_out)
    path, most = checked(args.model, args.k)
    warn_untrained(path, args.k)
    k = args.k or most
    saved = read_json(path / CONFIG_NAME)  # which `checked` has verified
    size, pooling = saved["base"]["fingerprint"]["hidden_size"], saved["fwd2bot"]["pooling"]
    name = str(Path(args.model).absolute()) if Path(args.model).is_dir() else args.model
    reading = reading_of(args)
    own = {"model": name, "quantised": quantisation(args) or "", **reading.told()}
    settings = CacheSettings(fingerprint_of(path), k, size, args.codec, pooling, **own)
    cache, compressor = SummaryCache.create(args.cache, settings), None
    if not args.ray:
        compressor = Compressor(*load_model(path, args), k, args.batch_size, args.max_pixels, reading)

    def again(images: dict[str, Path]) -> Filled:
        if args.ray:
            loading = {name: getattr(args, name) for name in ("base", "device", "dtype", "load_4bit", "load_8bit")}
            options = {"batch_size": args.batch_size, "max_pixels": args.max_pixels, "retry": args.retry}
            return fill_by_ray(cache, images, path, loading, **options)
        return fill(cache, images, compressor, retry=args.retry, workers=args.workers)

    result = again(images)
    if args.watch is None and len(result.skipped) == len(images):
        raise ValueError(f"None of the {len(images)} image(s) could be used. The first: {result.skipped[0]['reason']}")
    if args.watch is not None:
        print(f"fwd2bot: watching {', '.join(args.images)} every {args.watch:g} s; Ctrl-C ends", file=sys.stderr)
        watch(lambda: find_images(args.images, empty=True)[0], again, args.watch)
    skipped = [{"id": row["id"], "reason": row["reason"]} for row in result.skipped]
    return {
        "cache": args.cache,
        "images": len(cache),
        "compressed": result.compressed,
        "renamed": result.renamed,
        "known": result.known,
        "skipped": [*refused, *skipped],
        "left_out": dict(left_out),
        **reading.told(),
        "k": k,
        "dim": settings.size,
        "codec": args.codec,
        "seconds": round(result.seconds, 3),
    }


def reading_of(args: argparse.Namespace) -> Reading:
    """How the files of --cache are read: as those that are in it; in a new one as --exif-orientation says.

    Raises:
        ValueError: --exif-orientation is not the cache's.
    """
    from ..cache.format import is_cache
    from ..cache.reader import SummaryCache
    from ..files.images import Reading

    if not is_cache(args.cache):
        return Reading(args.exif_orientation != "off", on_white=True)
    settings = SummaryCache.open(args.cache).settings
    if args.exif_orientation not in (None, settings.exif_orientation):
        raise ValueError(
            f"{args.cache} was made with --exif-orientation {settings.exif_orientation}, and its images are not mixed "
            f"with others: leave out --exif-orientation {args.exif_orientation}, or choose another --cache."
        )
    if settings.reading != Reading(args.exif_orientation != "off", on_white=True):
        kept = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in settings.reading.told().items())
        print(f"fwd2bot: {args.cache} goes on as it was made ({kept})", file=sys.stderr)
    return settings.reading


def said(done: dict[str, Any]) -> str:
    """The figures in words; the skipped images at the end, by name."""
    from ..files.folders import told

    rate = f", {done['compressed'] / max(done['seconds'], 0.001):.1f} images/s" if done["compressed"] else ""
    text = (
        f"{done['images']:,} images in {done['cache']}: {done['compressed']:,} compressed, {done['known']:,} known, "
        f"{done['renamed']:,} under another name, {len(done['skipped']):,} skipped, {done['seconds']:.1f} s{rate}"
    )
    hint = ["  (--retry reads those again that have not changed)"] if done["skipped"] else []
    if done["left_out"]:
        hint.append(f"  left out of the folders: {told(Counter(done['left_out']))}")
    return "\n".join([text, *(f"  skipped {entry['reason']}" for entry in done["skipped"]), *hint])


def summaries_for_answer(args: argparse.Namespace, path: Path) -> tuple[list[str], Any]:
    """`fwd2bot ask --cache`: the ids that are asked about, their summaries [M, k, D], the model if it was needed."""
    from ..cache import search as finder
    from ..cache.reader import SummaryCache
    from ..cache.summary_file import fingerprint_of

    cache = SummaryCache.open(args.cache, fingerprint_of(path))
    if args.id:
        return args.id, (cache.get(args.id, args.k), None)
    loaded = load_model(path, args)
    query = finder.summary_of_text(*loaded, args.search, cache.settings.k)
    hits = finder.search(cache, query, args.top, args.filter, args.exact or None, args.rerank == "maxsim")
    if not hits:
        raise ValueError(
            f"{args.cache}: nothing was found for {args.search!r}; is the cache empty, or --filter too strict?"
        )
    ids = [hit["id"] for hit in hits]
    return ids, (cache.get(ids, args.k), loaded)


def main(argv: Sequence[str]) -> int | None:
    """`fwd2bot cache …`."""
    commands = Parser(prog="fwd2bot").add_subparsers(parser_class=Parser)
    add_cache(commands)
    args = commands.choices["cache"].parse_args(argv)
    return args.run(args)
