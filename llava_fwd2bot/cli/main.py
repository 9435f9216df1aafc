"""The command line: `fwd2bot train | info | ask | compress | search | cache | convert | eval | llava`.

torch and transformers are imported inside the subcommands, so that `fwd2bot --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from ..version import __version__
from .cache import add_cache, add_search, fill_options, run_fill, search_options
from .options import checked, count, exif_option, folder_of, load_model, model_options, number

STORE_DTYPES = ("float16", "bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    With FWD2BOT_TRACEBACK=1 an error is raised as it is, with its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank"):  # the deepspeed launcher puts it first
        argv.append(argv.pop(0))
    try:
        if argv[:1] == ["train"]:  # its arguments are LLaVA's and transformers' own, read by their own parser
            from ..training.command import train

            train(argv[1:])
            return 0
        if argv[:2] == ["llava", "train"]:
            from ..training.original import train as train_original

            train_original(argv[2:])
            return 0
        if argv[:2] == ["llava", "eval"]:
            from ..evaluation.original import evaluate

            evaluate(argv[2:])
            return 0
        if argv[:1] == ["eval"]:
            from .evaluate import main as evaluate_ours

            evaluate_ours(argv[1:])
            return 0
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except SystemExit as stop:  # argparse's, after --help or wrong usage
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("fwd2bot: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("FWD2BOT_TRACEBACK") == "1":
            raise
        message = _message(error)
        if message is None:
            raise
        print(f"fwd2bot: error: {message}", file=sys.stderr)
        return 1


def _message(error: Exception) -> str | None:
    """What the user is told, or None for what can only be a fault of this program."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, as torch may not be loaded
        return "the device is out of memory: try a smaller --batch-size, --load-4bit or another --device"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, (ValueError, OSError, ImportError)) else None


# ---------------------------------------------------------------------- arguments
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fwd2bot", description="LLaVA with images condensed into a few summary tokens.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fwd2bot {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    plain: dict[str, Any] = {"allow_abbrev": False}

    commands.add_parser("train", help="train, with LLaVA's own arguments and --fwd2bot K", add_help=False)

    llava = commands.add_parser("llava", help="the original LLaVA's own programs: llava train …, llava eval …", **plain)
    llava.add_argument("program", choices=("train", "eval"), help="its own arguments follow, and --fwd2bot K or --k J")

    commands.add_parser("eval", help="answer, score, retrieval, captioning, cost, report, …", add_help=False)

    info = commands.add_parser("info", help="what a checkpoint is, without loading the model", allow_abbrev=False)
    info.add_argument("checkpoint", metavar="CKPT", help="the Fwd2Bot checkpoint: a folder or a hub name")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="to the other layout: original LLaVA's or transformers'", **plain)
    convert.add_argument("checkpoint", metavar="CKPT", help="the Fwd2Bot checkpoint")
    convert.add_argument("--base", required=True, metavar="PATH", help="the same LLaVA in the other layout")
    convert.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    convert.set_defaults(run=_convert)

    asking = {"parents": [model_options(required=False)], "allow_abbrev": False}
    ask = commands.add_parser("ask", help="ask about images, or about stored summaries", **asking)
    ask.add_argument("question", nargs="?", help="the question; <image> in it says where an image stands")
    ask.add_argument("--image", nargs="+", action="extend", metavar="FILE", help="the image, or several in order")
    ask.add_argument("--summaries", metavar="FILE", help="a file of `fwd2bot compress`, in the place of --image")
    ask.add_argument("--cache", metavar="PATH", help="a cache of `fwd2bot compress --cache`, in the place of --image")
    ask.add_argument("--id", action="append", metavar="ID", help="the image in --summaries or --cache; may be repeated")
    ask.add_argument("--search", metavar="TEXT", help="with --cache: ask about the images found by these words")
    search_options(ask, count, top=5)
    ask.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="default: 128")
    at_least_0 = number(float, 0, "a number")
    ask.add_argument(
        "--temperature", type=at_least_0, default=0.0, metavar="T", help="0 (default): always the likeliest"
    )
    exif_option(ask)
    ask.set_defaults(run=_ask, parser=ask)

    storing = {"parents": [model_options(required=False)], "allow_abbrev": False}
    compress = commands.add_parser("compress", help="store the summaries of many images", **storing)
    help = "folders, files, patterns ('*.jpg'), a .txt with a path in each line, - for stdin; with --cache also .tar, "
    help += ".parquet, hf://NAME, s3://…"
    compress.add_argument("--images", nargs="+", required=True, metavar="PATH", help=help)
    target = compress.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE", help="the .safetensors file to write")
    target.add_argument("--cache", metavar="PATH", help="the cache to make or to bring up to date")
    compress.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    compress.add_argument("--batch-size", type=count, default=8, metavar="N", help="default: 8")
    compress.add_argument("--max-pixels", type=count, metavar="N", help="skip larger images; default: 178,956,970")
    compress.add_argument(
        "--store-dtype", choices=STORE_DTYPES, default="float16", help="of --output; default: float16"
    )
    exif_option(compress)
    fill_options(compress, count)
    compress.set_defaults(run=_compress, parser=compress)

    add_search(commands, {"parents": [model_options(k=False, required=False)], "allow_abbrev": False}, count)
    add_cache(commands)
    return parser


def _images_and_question(args: argparse.Namespace) -> None:
    """`--image a.jpg "what is it?"`: argparse gives the last word to --image, whose it is not."""
    if args.question is None and args.image and len(args.image) > 1 and not Path(args.image[-1]).is_file():
        args.question = args.image.pop()
    if args.question is None:
        args.parser.error('the question is missing, e.g.: fwd2bot ask --model CKPT --image FILE "What is this?"')
    if sum(map(bool, (args.image, args.summaries, args.cache))) != 1:
        args.parser.error("give one of --image FILE, --summaries FILE --id ID, and --cache PATH --id ID")
    if not (args.model or args.cache):
        args.parser.error("--model is missing")
    if args.cache and bool(args.id) == bool(args.search):
        args.parser.error('with --cache give either --id ID or --search "words"')
    if bool(args.summaries) != bool(args.id) and not args.cache:
        args.parser.error("--id ID goes with --summaries FILE or --cache PATH, and --summaries with --id")
    if args.exif_orientation and not args.image:
        args.parser.error("--exif-orientation goes with --image; summaries were read when they were made")
    if args.search and not args.cache:
        args.parser.error("--search goes with --cache PATH")
    if not args.search and (args.filter or args.rerank or args.exact):
        args.parser.error("--filter, --rerank and --exact go with --search")


# ---------------------------------------------------------------------- commands
def _info(args: argparse.Namespace) -> None:
    from .info import describe, render

    found = describe(folder_of(args.checkpoint))
    print(json.dumps(found, indent=2) if args.json else render(found))


def _convert(args: argparse.Namespace) -> None:
    from ..checkpoint.convert import convert

    print(convert(folder_of(args.checkpoint), args.base, args.output))


def _ask(args: argparse.Namespace) -> None:
    _images_and_question(args)
    with ExitStack() as stack:
        if args.json:  # whatever a library prints
            stack.enter_context(redirect_stdout(sys.stderr))
        answer = _answer(args)
    if args.json:
        print(json.dumps(answer))


def _answer(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..files.images import Reading, check_prepared
    from ..processing.images import join_pixels, open_image, prepare_pixels, prepared_size

    if args.model is None:
        from .cache import model_of

        args.model = model_of(args.cache)
    path, _ = checked(args.model, args.k)
    inputs: dict[str, Any] = {}
    names, loaded = args.image or args.id, None
    if args.summaries:
        from ..cache.summary_file import fingerprint_of, read_summaries

        inputs["summary"] = read_summaries(args.summaries, args.id, fingerprint_of(path), args.k)
    elif args.cache:
        from .cache import summaries_for_answer

        names, (inputs["summary"], loaded) = summaries_for_answer(args, path)
    reading = Reading(args.exif_orientation != "off", on_white=True)
    pictures = [open_image(name, reading=reading, prepared=lambda size: 0) for name in args.image or []]
    model, processor = loaded or load_model(path, args)
    for name, picture in zip(args.image or [], pictures, strict=True):
        check_prepared(picture.size, prepared_size(processor), name)

    from transformers import TextStreamer

    from ..processing.conversation import ConversationFormatter, prompt_ids

    prompt = ConversationFormatter(processor).prompt(args.question, len(names))
    inputs.update(prompt_ids(processor, prompt).to(model.device))
    if "summary" in inputs:
        inputs["summary"] = inputs["summary"].to(model.device)
    else:
        pixels = [prepare_pixels(processor, model, pictures)]
        inputs.update(join_pixels(pixels, model.get_input_embeddings().weight))
    if args.temperature > 0:
        inputs.update(do_sample=True, temperature=args.temperature)
    else:
        inputs["do_sample"] = False
    if not args.json:
        inputs["streamer"] = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    with torch.inference_mode():
        sequences = model.generate(**inputs, num_tokens=args.k, max_new_tokens=args.max_new_tokens)
    seconds = time.perf_counter() - started
    new = sequences[0, inputs["input_ids"].shape[1] if model.prompt_in_output else 0 :]
    answer = processor.tokenizer.decode(new, skip_special_tokens=True)
    stored = inputs["summary"].shape[1] if "summary" in inputs else model.fwd2bot_config.num_summary_tokens
    return {
        "question": args.question,
        "images": names,
        "k": args.k or stored,
        "answer": answer.strip(),
        "seconds": round(seconds, 3),
    }


def _compress(args: argparse.Namespace) -> int | None:
    if not args.cache and (args.watch is not None or args.ray or args.retry or args.codec or args.fast_decode):
        args.parser.error("--watch, --ray, --retry, --codec and --fast-decode go with --cache PATH")
    if not args.cache and not args.model:
        args.parser.error("--model is missing")
    if args.ray and (args.watch is not None or args.workers):
        args.parser.error("--ray goes without --watch and --workers")
    if args.cache:
        return run_fill(args)
    from ..cache.summary_file import check_output, compress_images, find_images, fingerprint_of
    from ..files.folders import told
    from ..files.images import Reading

    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        output = check_output(args.output, args.overwrite)  # what can fail fails before the work
        left_out: Counter[str] = Counter()
        images, skipped = find_images(args.images, left_out=left_out)
        path, _ = checked(args.model, args.k)
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
    if args.json:
        print(json.dumps(done))
    else:
        print(
            f"{done['images']} images as {done['k']} x {done['dim']} {done['dtype']} in {done['output']} "
            f"({done['bytes'] / 1e6:,.1f} MB), {len(done['skipped'])} skipped, {done['seconds']:.1f} s, "
            f"{done['images'] / done['seconds']:.1f} images/s"
        )
        if left_out:
            print(f"  left out of the folders: {told(left_out)}")


if __name__ == "__main__":
    sys.exit(main())
