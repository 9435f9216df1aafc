"""Runs a study, or makes its report.

    python -m eval.studies run eval/studies/smol.yaml --data DATA --work DIR [--jobs 2] [--only ROW …]
    python -m eval.studies report eval/studies/smol.yaml

A study is a YAML file (study.py) and a module that knows its items. `run` adds rows to RESULTS/NAME.rows.jsonl and
resumes where it was stopped; `report` makes RESULTS/NAME.json, NAME.md and NAME.png of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_fwd2bot.cli.options import count
from llava_fwd2bot.evaluation.results import with_ending

from .report import report
from .rows import Rows
from .run import Job, module_of, run, run_one
from .study import Study

RESULTS = Path(__file__).parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("study", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of rows and reports")
    parser.add_argument("--data", type=Path, help="the folder of photographs: flickr8k, daquar, coco_val2017, bench")
    parser.add_argument("--work", type=Path, help="checkpoints and logs, to resume from")
    parser.add_argument("--jobs", type=count, default=1, help="number of parallel runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--limit", type=count, help="use only the first N items of each task")
    parser.add_argument("--tuning", action="store_true", help="use the items held out for choosing settings")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    study = Study.read(a.study)
    if a.command == "report":
        print(report(study, a.results, module_of(study)))
        return 0
    if a.data is None or a.work is None:
        parser.error("run needs --data and --work")
    if not hasattr(module_of(study), "measure"):
        parser.error(f"{a.study} has no module that measures it; its title page says how it was made")
    if unknown := {*a.only} - {*study.rows}:
        parser.error(f"--only: there is no row {', '.join(sorted(unknown))}")
    rows = Rows(with_ending(a.results / study.name, ".rows.jsonl"))
    jobs = [
        Job(study, study.rows[name], seed, a.data.absolute(), a.work.absolute(), a.limit, a.tuning)
        for name, seed in study.runs()
        if not a.only or name in a.only
    ]
    if a.one:
        name, seed = json.loads(a.one)
        run_one(next(job for job in jobs if (job.row.name, job.seed) == (name, seed)), rows)
        return 0
    options = ["--results", str(a.results), "--data", str(a.data), "--work", str(a.work)]
    options += ["--limit", str(a.limit)] if a.limit is not None else []
    options += ["--tuning"] if a.tuning else []
    failed = run(a.study, jobs, rows, options, a.jobs)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
