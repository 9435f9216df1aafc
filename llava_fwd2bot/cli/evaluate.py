"""`fwd2bot eval …`: the evaluators on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from ..files.outputs import refuse_overlap
from ..files.writing import write_json
from .options import checked, count, load_model, model_folders, model_options, quantisation
from .parser import Parser
from .score import add_score, stamp

_REPORT = (".json", ".md", ".png", ".html")  # of `report --output NAME`


def main(argv: Sequence[str]) -> None:
    """Runs one evaluator; errors are ValueError or OSError with a message for the user."""
    parser = Parser(prog="fwd2bot eval", description="Answers, scores, retrieval, captions, cost and reports.")
    commands = parser.add_subparsers(metavar="EVALUATOR", required=True)
    add_score(commands)

    shared = {"parents": [_evaluator_options()], "allow_abbrev": False}
    retrieval = commands.add_parser("retrieval", help="R@1, 5, 10 of images by captions and vice versa", **shared)
    _data_options(retrieval)
    retrieval.add_argument(
        "--maxsim",
        action="store_true",
        help="also rank by single tokens",
    )
    retrieval.set_defaults(run=_retrieval)

    parts = commands.add_parser("compositionality", help="SugarCrepe, SugarCrepe++ or Winoground", **shared)
    parts.add_argument("--tests", required=True, type=Path, metavar="PATH", help="the folder of JSON files, or .jsonl")
    parts.add_argument("--images", required=True, type=Path, metavar="DIR", help="the folder of the images")
    parts.add_argument("--skip-missing", action="store_true", help="leave out, and count, tests without their image")
    parts.add_argument("--no-likelihood", action="store_true", help="score by embeddings only")
    parts.set_defaults(run=_compositionality)

    captioning = commands.add_parser("captioning", help="one sentence per image: CIDEr, BLEU-4, SPICE", **shared)
    _data_options(captioning)
    captioning.add_argument("--with-base", action="store_true", help="also caption by the base, from dense tokens")
    captioning.add_argument("--spice", action="store_true", help="also compute SPICE, which needs Java and minutes")
    captioning.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="default: 64")
    captioning.set_defaults(run=_captioning)

    answer = commands.add_parser("answer", help="answer a question file in LLaVA's format", **shared)
    answer.add_argument(
        "--questions", required=True, type=Path, metavar="FILE", help="JSON lines of question_id, image, text"
    )
    answer.add_argument("--images", required=True, type=Path, metavar="DIR", help="the folder of the images")
    answer.add_argument(
        "--answers",
        required=True,
        type=Path,
        metavar="FILE",
        help="the answers file to write; an existing one is continued",
    )
    answer.add_argument("--from-base", action="store_true", help="answer by the base, from dense tokens")
    answer.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="default: 128")
    answer.set_defaults(run=_answer)

    codec = commands.add_parser("codec", help="compare the codecs of a cache: retrieval and answers", **shared)
    _data_options(codec, required=False)
    codec.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines of question_id, image, text, answer")
    codec.add_argument("--codecs", nargs="+", metavar="NAME", help="default: all")
    codec.add_argument("--max-new-tokens", type=count, default=16, metavar="N", help="default: 16")
    codec.set_defaults(run=_codec)

    cost_parser = commands.add_parser("cost", help="time, operations, memory and bytes over the base's", **shared)
    cost_parser.add_argument("--image", type=Path, metavar="FILE", help="default: noise of 640 x 480")
    cost_parser.add_argument("--rounds", type=count, default=7, metavar="N", help="timed runs of each side; default: 7")
    cost_parser.add_argument("--new-tokens", type=count, default=16, metavar="N", help="answer length; default: 16")
    cost_parser.set_defaults(run=_cost)

    report = commands.add_parser("report", help="compare results with the base's, from the files that --output wrote")
    report.add_argument(
        "results", nargs="+", type=Path, metavar="PATH", help="result files (also of cost and codec), or folders"
    )
    report.add_argument("--base", metavar="MODEL", help="the base's name; default: the model on dense tokens")
    report.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json, NAME.md, NAME.png and NAME.html")
    report.set_defaults(run=_report)
    args = parser.parse_args(list(argv))
    from ..cache.format import writable

    for name in ("output", "submission", "answers"):
        file = getattr(args, name, None)
        if isinstance(file, Path):  # checked before the model is loaded
            if file.is_dir() and args.run is not _report:  # for a report it is a prefix of file names
                raise IsADirectoryError(21, f"--{name} is a folder: name a file", str(file))
            _keep_inputs(args, name, file)
            file.parent.mkdir(parents=True, exist_ok=True)
            writable(file.parent)
    args.run(args)


def _keep_inputs(args: argparse.Namespace, name: str, output: Path) -> None:
    """Raises ValueError if an output would overwrite an input or another output."""
    written = [output.with_name(output.name + end) for end in _REPORT] if args.run is _report else [output]
    for target in written:
        refuse_overlap(f"--{name}", target, models=model_folders(args))
        for other, value in vars(args).items():
            for file in value if isinstance(value, list) else [value]:
                if other != name and isinstance(file, Path) and (file.is_file() or file.resolve() == target.resolve()):
                    refuse_overlap(f"--{name}", target, files={f"--{other}".replace("_", "-"): file})
                    if file == target:
                        raise ValueError(f"--{name} and --{other} are the same file: {file}. Choose two files.")


def _report(args: argparse.Namespace) -> None:
    from ..evaluation.report import report

    print(report(args.results, args.output, args.base), end="")


def _data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--dataset", required=required, metavar="NAME|FILE", help="flickr30k, coco, nocaps or a file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="the annotation file, if --dataset is a name")
    parser.add_argument("--split", default="test", help="Karpathy's split or NoCaps' domain; default: test")


def _evaluator_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[model_options(k=False)])
    options.add_argument("--k", type=count, nargs="+", metavar="J", help="numbers of summary tokens; default: all")
    options.add_argument("--limit", type=count, metavar="N", help="use only the first N items; recorded in the result")
    options.add_argument("--batch-size", type=count, default=16, metavar="N", help="default: 16")
    options.add_argument(
        "--work",
        type=Path,
        default=Path("fwd2bot-eval"),
        metavar="DIR",
        help="stores encodings, from which a stopped run resumes; default: fwd2bot-eval",
    )
    options.add_argument("--output", type=Path, metavar="FILE", help="write the result here, as JSON")
    return options


def _evaluate(
    args: argparse.Namespace,
    run: Callable[[Any, list[int]], tuple[dict[str, Any], dict[str, Any]]],
    show: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Loads the model, runs an evaluator on its encoder, and prints and writes the result.

    Args:
        run: (encoder, ks) → (result, {name: score of each item}).
        show: the result as text; default: its rows as a table.
    """
    from ..cache.summary_file import fingerprint_of
    from ..evaluation.encode import Encoder
    from ..evaluation.tables import results_table

    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        path, most = checked(args.model, *(args.k or []))
        ks = args.k or [most]
        model, processor = load_model(path, args)
        quantised = quantisation(args)
        # cached encodings are specific to the weights and to their quantisation
        fingerprint = fingerprint_of(path)
        fingerprint_and_width = " ".join(filter(None, (fingerprint, quantised)))
        found, per_item = run(Encoder(model, processor, fingerprint_and_width, args.work, args.batch_size), ks)
        about = {"model": str(args.model), "fingerprint": fingerprint, "dtype": str(model.dtype)[6:]}
        result = {**found, **about, "quantised": quantised, "limit": args.limit, **stamp(args)}
    if args.output:
        write_json(args.output, {**result, "per_item": per_item})
    if args.json:
        print(json.dumps(result))
    else:
        print((show or results_table)(found))


def _retrieval(args: argparse.Namespace) -> None:
    from ..evaluation import retrieval
    from ..evaluation.datasets import read_captioned

    data = read_captioned(args.dataset, args.images, args.annotations, args.split).first(args.limit)

    def run(encoder: Any, ks: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows, ranks = retrieval.retrieval(encoder, data, ks, args.maxsim)
        description = {"evaluator": "retrieval", **retrieval.about(data), "split": args.split}
        owner = [i for i, captions in enumerate(data.captions) for _ in captions]
        return {**description, "rows": rows, "image_of_item": owner}, ranks

    _evaluate(args, run)


def _captioning(args: argparse.Namespace) -> None:
    from ..evaluation import captioning
    from ..evaluation.answers import Answerer
    from ..evaluation.datasets import read_captioned
    from ..evaluation.retrieval import about

    data = read_captioned(args.dataset, args.images, args.annotations, args.split).first(args.limit)

    def run(encoder: Any, ks: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        answerer = Answerer(encoder, args.max_new_tokens, args.batch_size)
        rows, cider = captioning.captioning(answerer, data, ks, args.work, str(args.model), args.with_base, args.spice)
        return {"evaluator": "captioning", **about(data), "split": args.split, "rows": rows}, cider

    _evaluate(args, run)


def _codec(args: argparse.Namespace) -> None:
    from ..cache.codecs import CODECS
    from ..evaluation import codec, retrieval
    from ..evaluation.answers import Answerer
    from ..evaluation.datasets import read_captioned

    data = None
    if args.dataset:
        data = read_captioned(args.dataset, args.images, args.annotations, args.split).first(args.limit)

    names = args.codecs or list(CODECS)
    codec.checked(data, names, args.questions, args.images, args.limit)

    def run(encoder: Any, ks: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        answerer = Answerer(encoder, args.max_new_tokens, args.batch_size)
        rows, items = codec.codecs(answerer, data, ks, names, args.questions, args.images, args.limit)
        about = {} if data is None else retrieval.about(data)
        if args.questions:
            about["questions"] = len(next(values for name, values in items.items() if name.startswith("accuracy")))
        return {"evaluator": "codec", **about, "rows": rows}, items

    _evaluate(args, run, codec.table)


def _cost(args: argparse.Namespace) -> None:
    from ..evaluation import cost
    from ..processing.images import open_image

    image = None if args.image is None else open_image(args.image)

    def run(encoder: Any, ks: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        found = cost.cost(
            encoder.model, encoder.processor, ks, image, args.rounds, (1, args.batch_size), new_tokens=args.new_tokens
        )
        return {"evaluator": "cost", **found}, {}

    _evaluate(args, run, cost.table)


def _answer(args: argparse.Namespace) -> None:
    from ..evaluation.answers import DENSE, Answerer, answer_questions, read_questions

    lines = read_questions(args.questions)
    if args.k and len(args.k) > 1:
        raise ValueError("eval answer writes one file: give one --k.")

    def run(encoder: Any, ks: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        answerer = Answerer(encoder, args.max_new_tokens, args.batch_size)
        k = DENSE if args.from_base else ks[0]
        done = answer_questions(answerer, lines, args.images, args.answers, k, str(args.model), args.limit)
        return {"evaluator": "answer", "k": k or "dense", **done}, {}

    _evaluate(args, run, json.dumps)


def _compositionality(args: argparse.Namespace) -> None:
    from ..evaluation import compositionality

    tests = compositionality.read_items(args.tests, args.images, args.skip_missing)
    tests.items = tests.items[: args.limit]

    def run(encoder: Any, ks: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows, passed = compositionality.compositionality(encoder, tests, ks, not args.no_likelihood)
        description = {"evaluator": "compositionality", **compositionality.about(tests), "rows": rows}
        return {
            **description,
            "image_of_item": [" ".join(path.name for path in item.images) for item in tests.items],
        }, passed

    _evaluate(args, run)
