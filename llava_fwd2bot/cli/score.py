"""`fwd2bot eval score`: score existing answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..evaluation import scorers
from ..evaluation.tables import decimals
from ..files.text import json_line
from ..files.writing import write_json, write_text
from ..version import __version__
from .options import count

PROMPT_KEYS = ("textvqa", "mme")  # there one question_id has several questions


def add_score(commands: Any) -> None:
    score = commands.add_parser("score", help="score existing answers, in a benchmark's official format or your own")
    score.add_argument("benchmark", choices=sorted(scorers.SCORERS), help="the benchmark; own: your own questions")
    score.add_argument("--answers", nargs="+", required=True, type=Path, metavar="FILE", help="LLaVA's answers file(s)")
    help = "; ".join(f"{name}: {entry[2] or 'none'}" for name, entry in scorers.SCORERS.items())
    score.add_argument("--ground-truth", type=Path, metavar="PATH", help=help)
    score.add_argument("--questions", type=Path, metavar="FILE", help="LLaVA's question file, for pope and vizwiz")
    how = "for own: exact (default), soft (VQA accuracy over several answers), yes-no, or choice (a letter)"
    score.add_argument("--match", choices=scorers.MATCHES, help=how)
    score.add_argument(
        "--empty-is-wrong", action="store_true", help="count empty answers as wrong; default: refuse them"
    )
    help = "write the answers in the format of the benchmark's server or scorer"
    score.add_argument("--submission", type=Path, metavar="FILE", help=help)
    score.add_argument("--output", type=Path, metavar="FILE", help="write the scores, with those of each item, as JSON")
    help = "number of summary tokens that the answers are from, or dense; default: as recorded in the answers"
    score.add_argument("--k", type=tokens, metavar="J", help=help)
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score, parser=score)


def tokens(text: str) -> int | str:
    return text if text == "dense" else count(text)


def stamp(args: argparse.Namespace) -> dict[str, Any]:
    """Provenance of a result: options, versions, date. `seed` is None: decoding is greedy and search is exact."""
    versions = {"llava_fwd2bot": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "json", "output", "parser")}
    settings = json.loads(json.dumps(settings, default=str))
    return {"date": str(date.today()), "versions": versions, "seed": None, "settings": settings}


def _score(args: argparse.Namespace) -> None:
    function = scorers.scorer(args.benchmark)
    _, _, truth, needs_questions = scorers.SCORERS[args.benchmark]
    given: dict[str, Any] = {}
    if args.match and args.benchmark != "own":
        args.parser.error("--match requires own; benchmarks have official matching rules")
    if args.benchmark == "own":
        given["match"] = args.match or "exact"
    # VQAv2's test splits: only the server has the answers
    by_server = args.benchmark == "vqav2" and args.submission and args.ground_truth is None
    needs_truth, needs_questions = truth is not None and not by_server, needs_questions or by_server
    for name, needed in (("ground_truth", needs_truth), ("questions", needs_questions)):
        value = getattr(args, name)
        if needed and value is None:
            raise ValueError(
                f"{args.benchmark} needs --{name.replace('_', '-')}" + f" ({truth})" * (name[0] == "g") + "."
            )
        if needed:
            given[name] = value
    key = "question_id+prompt" if args.benchmark in PROMPT_KEYS else "question_id"
    answers = scorers.read_answers(args.answers, key, args.empty_is_wrong)
    record = next(iter(answers.values()))
    metadata = scorers.metadata_of(record)
    if None not in (metadata.get("k"), args.k) and metadata["k"] != args.k:
        raise ValueError(f"The answers were made with k = {metadata['k']}, but --k is {args.k}: leave out --k.")
    found = function(answers, **given)
    found.k = metadata.get("k") or args.k
    about = {"benchmark": args.benchmark, "model": record.get("model_id"), "codec": metadata.get("codec")}
    about |= {"answers": [str(path) for path in args.answers], **stamp(args)}
    if args.submission:
        if found.submission is None:
            raise ValueError(f"{args.benchmark} has no submission format.")
        if found.note:
            print(f"fwd2bot: {args.benchmark}: {found.note}", file=sys.stderr)
        if found.submission_lines:
            write_text(args.submission, "".join(map(json_line, found.submission)))
        else:
            write_json(args.submission, found.submission)
    row = found.as_json()
    if args.output:
        write_json(args.output, {**about, **row})
    if args.json:
        print(json.dumps(about | {name: row[name] for name in ("k", "figures", "items", "items_of_figure")}))
    elif not found.figures:
        print(f"{args.benchmark}: no score can be computed offline" + "; see --submission" * (args.submission is None))
    else:
        print("\n".join(_figures(found, args.benchmark)))


def _figures(found: scorers.Score, benchmark: str) -> Iterator[str]:
    """A line per figure: percentages with as many decimals as their items support; POPE has shares, MME points."""
    width = max(map(len, found.figures))
    for name, value in found.figures.items():
        count = found.counts.get(name, len(found.per_item))
        places = 1 if benchmark == "mme" else decimals(count) + 2 * (benchmark == "pope")
        yield f"{name:<{width}}  {value:>6.{places}f}  (n = {count:,})"
