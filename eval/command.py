"""`fwd2bot eval …`: the evaluators on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from llava_fwd2bot.config import write_json
from llava_fwd2bot.version import __version__

from . import scorers

PROMPT_KEYS = ("textvqa", "mme")  # one question_id has several questions there


def main(argv: Sequence[str]) -> None:
    """Runs one evaluator; raises ValueError or OSError with what to tell the user."""
    parser = argparse.ArgumentParser(prog="fwd2bot eval", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="EVALUATOR", required=True)
    score = commands.add_parser("score", help="score answers that exist, in a benchmark's official formats")
    score.add_argument("benchmark", choices=sorted(scorers.SCORERS), help="which benchmark")
    score.add_argument("--answers", nargs="+", required=True, type=Path, metavar="FILE", help="LLaVA's answers file(s)")
    told = "; ".join(f"{name}: {entry[2]}" for name, entry in scorers.SCORERS.items())
    score.add_argument("--ground-truth", type=Path, metavar="PATH", help=told)
    score.add_argument("--questions", type=Path, metavar="FILE", help="LLaVA's question file, for pope and vizwiz")
    score.add_argument(
        "--empty-is-wrong", action="store_true", help="count empty answers as wrong; default: refuse them"
    )
    score.add_argument("--submission", type=Path, metavar="FILE", help="write what the benchmark's server takes here")
    score.add_argument("--output", type=Path, metavar="FILE", help="write figures and each item's score here, as JSON")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score)
    args = parser.parse_args(list(argv))
    args.run(args)


def _score(args: argparse.Namespace) -> None:
    function = scorers.scorer(args.benchmark)
    _, _, truth, needs_questions = scorers.SCORERS[args.benchmark]
    given: dict[str, Any] = {}
    for name, needed in (("ground_truth", not truth.startswith("none")), ("questions", needs_questions)):
        value = getattr(args, name)
        if needed and value is None:
            raise ValueError(
                f"{args.benchmark} needs --{name.replace('_', '-')}" + f" ({truth})" * (name[0] == "g") + "."
            )
        if needed:
            given[name] = value
    key = "question_id+prompt" if args.benchmark in PROMPT_KEYS else "question_id"
    answers = scorers.read_answers(args.answers, key, args.empty_is_wrong)
    found = function(answers, **given)
    result = {
        "benchmark": args.benchmark,
        "figures": found.figures,
        "items": len(found.per_item),
        "model": next(iter(answers.values())).get("model_id"),
        "answers": [str(path) for path in args.answers],
        "date": str(date.today()),
        "version": __version__,
    }
    if args.submission:
        if found.submission is None:
            raise ValueError(f"{args.benchmark} has no submission of its own.")
        write_json(args.submission, found.submission)
    if args.output:
        write_json(args.output, {**result, "per_item": found.per_item})
    if args.json:
        print(json.dumps(result))
    elif not found.figures:
        print(f"{args.benchmark}: no figure can be had offline" + "; see --submission" * (args.submission is None))
    else:
        width = max(map(len, found.figures))
        for name, value in found.figures.items():
            print(f"{name:<{width}}  {value:.4f}" if args.benchmark == "pope" else f"{name:<{width}}  {value:.2f}")
