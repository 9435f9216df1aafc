"""`fwd2bot compress`: store the summaries of many images in a file or a cache."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .fill import fill_options, run_fill
from .options import checked, count, exif_option, json_alone, load_model, model_folders, model_options, warn_untrained
from .parser import Parser

STORE_DTYPES = ("float16", "bfloat16", "float32")


def main(argv: Sequence[str]) -> int | None:
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.cache and (args.watch is not None or args.ray or args.retry or args.codec or args.fast_decode):
        parser.error("--watch, --ray, --retry, --codec and --fast-decode require --cache PATH")
    if args.engine and (not args.cache or args.ray):
        parser.error("--engine requires --cache PATH, and excludes --ray")
    if args.engine_key and not args.engine:
        parser.error("--engine-key requires --engine URL")
    if not args.cache and not args.model:
        parser.error("--model is missing")
    if args.ray and (args.watch is not None or args.workers):
        parser.error("--ray cannot be combined with --watch or --workers")
    if args.cache:
        return run_fill(args)
    with json_alone(args.json):
        text, done = _into_file(args)
    print(json.dumps(done) if args.json else text)
    return None


def _parser() -> argparse.ArgumentParser:
    about = "Store the summaries of many images, in a file or in a cache."
    compress = Parser(prog="fwd2bot compress", description=about, parents=[model_options(required=False)])
    help = "folders, files, patterns ('*.jpg'), a .txt with one path per line, - for stdin; with --cache also .tar "
    help += "(.gz, .bz2, .xz, .zst), .parquet, hf://NAME, s3://…"
    compress.add_argument("--images", nargs="+", required=True, metavar="PATH", help=help)
    target = compress.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE", help="the .safetensors file to write")
    target.add_argument("--cache", metavar="PATH", help="the cache to create or update")
    compress.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    compress.add_argument("--batch-size", type=count, default=8, metavar="N", help="default: 8")
    compress.add_argument("--max-pixels", type=count, metavar="N", help="skip larger images; default: 178,956,970")
    compress.add_argument(
        "--store-dtype", choices=STORE_DTYPES, default="float16", help="precision of --output; default: float16"
    )
    exif_option(compress)
    fill_options(compress, count)
    return compress


def _into_file(args: argparse.Namespace) -> tuple[str, dict]:
    from ..cache.summary_file import check_output, compress_images, fingerprint_of
    from ..files.folders import find_images, format_counts
    from ..files.outputs import refuse_overlap
    from ..files.pixels import Reading

    left_out: Counter[str] = Counter()
    images, skipped = find_images(args.images, left_out=left_out)
    same_name = {f"--images {path}": path for path in images.values() if path.name == Path(args.output).name}
    refuse_overlap("--output", args.output, models=model_folders(args), files=same_name)
    output = check_output(args.output, args.overwrite)  # what can fail fails before the work
    path, _ = checked(args.model, args.k)
    warn_untrained(path, args.k)
    model, processor = load_model(path, args)
    done = compress_images(
        model,
        processor,
        images,
        output,
        fingerprint=fingerprint_of(path),
        skipped=skipped,
        num_tokens=args.k,
        batch_size=args.batch_size,
        max_pixels=args.max_pixels,
        store_dtype=args.store_dtype,
        reading=Reading(args.exif_orientation != "off", on_white=True),
    )
    done["left_out"] = dict(left_out)
    text = (
        f"{done['images']} images as {done['k']} x {done['dim']} {done['dtype']} in {done['output']} "
        f"({done['bytes'] / 1e6:,.1f} MB), {len(done['skipped'])} skipped, {done['seconds']:.1f} s, "
        f"{done['images'] / max(done['seconds'], 0.001):.1f} images/s"
    )
    if left_out:
        text += f"\n  left out of the folders: {format_counts(left_out)}"
    return text, done
