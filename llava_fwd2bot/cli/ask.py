"""`fwd2bot ask`: a question about images, or about their stored summaries."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from .console import tell
from .options import (
    checked,
    count,
    exif_option,
    folder_of,
    json_alone,
    load_model,
    load_plain_model,
    model_options,
    number,
)
from .parser import Parser
from .search import model_of, search_options, summaries_for_answer


def main(argv: Sequence[str]) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.interactive:
        _check_interactive(args, parser)
        from .ask_session import run

        run(args, _one)
        return
    _take_question(args)
    _check(args, parser)
    with json_alone(args.json):
        answers = _answers(args)
    if args.json:
        print(json.dumps({"answers": answers} if args.each else answers[0]))


def _parser() -> argparse.ArgumentParser:
    about = (
        "Ask about images, or about stored summaries. Several images belong to one question, unless --each is given."
    )
    ask = Parser(prog="fwd2bot ask", description=about, parents=[model_options(required=False)])
    ask.add_argument("question", nargs="?", help="the question; <image> in it says where an image stands")
    ask.add_argument("--image", nargs="+", action="extend", metavar="FILE", help="the image, or several in order")
    ask.add_argument("--each", action="store_true", help="ask about each image by itself: one answer per image")
    ask.add_argument("--dense", action="store_true", help="also print the base's answer, from all dense tokens")
    ask.add_argument("--summaries", metavar="FILE", help="a file of `fwd2bot compress --output`, instead of --image")
    ask.add_argument("--cache", metavar="PATH", help="a cache of `fwd2bot compress --cache`, instead of --image")
    ask.add_argument("--id", action="append", metavar="ID", help="the image in --summaries or --cache; may be repeated")
    ask.add_argument("--search", metavar="TEXT", help="with --cache: ask about the images found by these words")
    help = "read questions from stdin until /quit or Ctrl-D; /image, /search and /k choose what they are about"
    ask.add_argument("--interactive", action="store_true", help=help)
    search_options(ask, count, top=5)
    ask.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="default: 128")
    at_least_0 = number(float, 0, "a number")
    ask.add_argument("--temperature", type=at_least_0, default=0.0, metavar="T", help="0 (default): greedy decoding")
    exif_option(ask)
    return ask


def _take_question(args: argparse.Namespace) -> None:
    """`--image a.jpg "what is it?"`: argparse gives the last word to --image, whose it is not."""
    if args.question is None and args.image and len(args.image) > 1 and not os.path.isfile(args.image[-1]):
        args.question = args.image.pop()


def _check_interactive(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.question is not None:
        parser.error("--interactive reads the questions from stdin: leave out the question")
    if sum(map(bool, (args.image, args.summaries, args.cache))) > 1:
        parser.error("give at most one of --image, --summaries and --cache")
    if not (args.model or args.cache):
        parser.error("--model is missing")
    if args.id and not (args.summaries or args.cache):
        parser.error("--id goes with --summaries FILE or --cache PATH")
    if args.search and (args.id or not args.cache):
        parser.error("--search goes with --cache PATH, without --id")
    if args.dense and (args.summaries or args.cache):
        parser.error("--dense goes with images: the base reads the image, and no summary")


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.question is None:
        parser.error('the question is missing, e.g.: fwd2bot ask --model CKPT --image FILE "What is this?"')
    if not args.question.replace("<image>", "").strip():
        parser.error('the question is empty; say for example "What is this?"')
    if sum(map(bool, (args.image, args.summaries, args.cache))) != 1:
        parser.error("give one of --image FILE, --summaries FILE --id ID, and --cache PATH --id ID")
    if not (args.model or args.cache):
        parser.error("--model is missing")
    if args.cache and bool(args.id) == bool(args.search):
        parser.error('with --cache give either --id ID or --search "words"')
    if bool(args.summaries) != bool(args.id) and not args.cache:
        parser.error("--id ID goes with --summaries FILE or --cache PATH, and --summaries with --id")
    if args.exif_orientation and not args.image:
        parser.error("--exif-orientation goes with --image; summaries were read when they were made")
    if args.search and not args.cache:
        parser.error("--search goes with --cache PATH")
    if not args.search and (args.filter or args.rerank or args.exact):
        parser.error("--filter, --rerank and --exact go with --search")
    if args.dense and not args.image:
        parser.error("--dense goes with --image: the base reads the image, and no summary")


def _answers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The answers, printed as they are generated unless --json is given."""
    from ..checkpoint.load import is_plain
    from ..files.images import Reading, check_prepared, open_image
    from ..processing.images import prepared_size

    if args.model is None:
        args.model = model_of(args.cache)
    path = folder_of(args.model)
    plain = is_plain(path)
    if plain:
        _check_plain(args)
    else:
        path, _ = checked(args.model, args.k)
    names, summary, loaded = args.image or args.id, None, None
    if args.summaries:
        from ..cache.summary_file import fingerprint_of, read_summaries

        summary = read_summaries(args.summaries, args.id, fingerprint_of(path), args.k)
    elif args.cache:
        names, (summary, loaded) = summaries_for_answer(args, path)
    reading = Reading(args.exif_orientation != "off", on_white=True)
    # what the host makes of their sizes is known once its processor is loaded
    images = [open_image(name, reading=reading, prepared=lambda size: 0) for name in args.image or []]
    if args.search:
        tell(f"asking about what was found for {args.search!r}: {', '.join(names)}")
    if len(names) > 1 and not args.each:
        tell(f"one question about all {len(names)} images; with --each, one answer for each")
    model, processor = loaded or (load_plain_model if plain else load_model)(path, args)
    for name, image in zip(args.image or [], images, strict=True):
        check_prepared(image.size, prepared_size(processor), name)
    found = []
    for part in ([i] for i in range(len(names))) if args.each else [list(range(len(names)))]:
        given = {"images": [images[i] for i in part]} if summary is None else {"summary": summary[part]}
        found.append(_one(args, model, processor, [names[i] for i in part], given))
    return found


def _check_plain(args: argparse.Namespace) -> None:
    """What a LLaVA without Fwd2Bot cannot do is refused before it is loaded."""
    for name in ("k", "summaries", "cache", "dense"):
        if getattr(args, name):
            raise ValueError(f"{args.model} has no Fwd2Bot, and answers from all dense tokens: leave out --{name}.")
    tell(f"{args.model} has no Fwd2Bot: it answers from all dense tokens")


def _one(
    args: argparse.Namespace, model: Any, processor: Any, names: list[str], given: dict[str, Any]
) -> dict[str, Any]:
    """One answer; with --dense also the base's."""
    k = None
    if hasattr(model, "fwd2bot"):
        stored = given["summary"].shape[1] if "summary" in given else model.fwd2bot_config.num_summary_tokens
        k = args.k or stored
    label = f"{names[0]}: " if args.each else ""
    started = time.perf_counter()
    text = _print_answer(
        args, model, processor, given, f"{label}{k} summary tokens: " if args.dense else label, k=args.k
    )
    found = {"question": args.question, "images": names, "k": k, "answer": text}
    found["seconds"] = round(time.perf_counter() - started, 3)
    if args.dense:
        found["dense"] = _print_answer(args, model, processor, given, f"{label}dense tokens: ", base=True)
    return found


def _print_answer(
    args: argparse.Namespace, model: Any, processor: Any, given: dict[str, Any], label: str, **options: Any
) -> str:
    from ..processing.answer import answer

    options |= {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature}
    if args.json:
        return answer(model, processor, args.question, **given, **options)
    print(label, end="", flush=True)
    pieces = []
    for piece in answer(model, processor, args.question, **given, **options, stream=True):
        print(piece if pieces or not label else piece.lstrip(), end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces).strip()
