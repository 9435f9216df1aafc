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

SHOWN = ("k", "answers", "questions", "answered_before")  # of `answer`
_REPORT = (".json", ".md", ".png", ".html")  # of `report --output NAME`


def main(argv: Sequence[str]) -> None:
    """Runs one evaluator; errors are ValueError or OSError with a message for the user."""
    parser = Parser(prog="fwd2bot eval", description="Answers, scores, retrieval, captions and reports.")
    commands = parser.add_subparsers(metavar="EVALUATOR", required=True)
    add_score(commands)

    shared = {"parents": [_evaluator_options()], "allow_abbrev": False}
    retrieval = commands.add_parser("retrieval", help="R@1, 5, 10 of images by captions and vice versa", **shared)
    _data_options(retrieval)
    retrieval.add_argument("--maxsim", action="store_true", help="also rank by single tokens")
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

    report = commands.add_parser("report", help="compare results with the base's, from the files that --output wrote")
    report.add_argument("results", nargs="+", type=Path, metavar="PATH", help="result files, or folders")
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


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, metavar="NAME|FILE", help="flickr30k, coco, nocaps or a file")
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
    help = (
        "use summaries as a cache of this codec gives them back: int8, int4 or int2; default: as they are, in float16"
    )
    options.add_argument("--codec", metavar="NAME", help=help)
    options.add_argument("--output", type=Path, metavar="FILE", help="write the result here, as JSON")
    return options


def _evaluate(
    args: argparse.Namespace,
    about: dict[str, Any],
    run: Callable[[Any, list[int]], Any],
    show: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Loads the model, runs an evaluator on its encoder, and prints and writes the result.

    Args:
        about: description of the items. run: (encoder, ks) → scores, or a dictionary that is written as it is.
        show: the result as text; default: its rows as a table.
    """
    from ..cache.codecs import get_codec
    from ..cache.summary_file import fingerprint_of
    from ..evaluation.encode import Encoder
    from ..evaluation.tables import results_table

    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        codec = None if args.codec is None else get_codec(args.codec)
        path, most = checked(args.model, *(args.k or []))
        model, processor = load_model(path, args)
        # cached encodings are specific to the weights and to their quantisation
        fingerprint, quantised = fingerprint_of(path), quantisation(args)
        identity = " ".join(filter(None, (fingerprint, quantised)))
        found = run(Encoder(model, processor, identity, args.work, args.batch_size, codec), args.k or [most])
        rows = {"rows": [score.as_json() for score in found]} if isinstance(found, list) else found
        result = {**about, "model": str(args.model), "fingerprint": fingerprint, "dtype": str(model.dtype)[6:]}
        result |= {"quantised": quantised, "codec": args.codec, "limit": args.limit, **stamp(args), **rows}
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result) if args.json else (show or results_table)(result))


def _captioned(evaluator: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The images and captions of --dataset, and their description in the result."""
    from ..evaluation.datasets import read_captioned
    from ..evaluation.retrieval import about

    data = read_captioned(args.dataset, args.images, args.annotations, args.split).first(args.limit)
    split = "" if args.split == "test" else f"-{args.split}"
    return data, {"benchmark": f"{evaluator} {data.name}{split}", "split": args.split, **about(data)}


def _retrieval(args: argparse.Namespace) -> None:
    from ..evaluation.retrieval import retrieval

    data, about = _captioned("retrieval", args)
    _evaluate(args, about, lambda encoder, ks: retrieval(encoder, data, ks, args.maxsim))


def _captioning(args: argparse.Namespace) -> None:
    from ..evaluation.answers import Answerer
    from ..evaluation.captioning import captioning

    data, about = _captioned("captioning", args)

    def run(encoder: Any, ks: list[int]) -> Any:
        answerer = Answerer(encoder, args.max_new_tokens, args.batch_size)
        return captioning(answerer, data, ks, args.work, str(args.model), args.with_base, args.spice)

    _evaluate(args, about, run)


def _compositionality(args: argparse.Namespace) -> None:
    from ..evaluation.compositionality import about, compositionality, read_items

    tests = read_items(args.tests, args.images, args.skip_missing)
    tests.items = tests.items[: args.limit]
    _evaluate(args, about(tests), lambda encoder, ks: compositionality(encoder, tests, ks, not args.no_likelihood))


def _answer(args: argparse.Namespace) -> None:
    from ..evaluation.answers import DENSE, Answerer, answer_questions, read_questions

    lines = read_questions(args.questions)
    if args.k and len(args.k) > 1:
        raise ValueError("eval answer writes one file: give one --k.")

    def run(encoder: Any, ks: list[int]) -> dict[str, Any]:
        answerer = Answerer(encoder, args.max_new_tokens, args.batch_size)
        k = DENSE if args.from_base else ks[0]
        done = answer_questions(answerer, lines, args.images, args.answers, k, str(args.model), args.limit)
        return {"k": k or "dense", **done}

    _evaluate(args, {}, run, lambda found: json.dumps({name: found[name] for name in SHOWN}))
