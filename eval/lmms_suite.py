"""The benchmarks that the field reports, by lmms-eval: the base from all its tokens, then Fwd2Bot from k of them.

    python -m eval.lmms_suite --model CKPT --k 16 4 1 --output DIR [--tasks pope gqa …] [--limit 100] [--dry-run]

Each run is lmms-eval's own command, printed before it starts; DIR gets a folder for the base and for each k. Summaries
are kept in DIR/summaries, so that a further k costs no compress pass. A run whose results are there is not done again.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# benchmark → lmms-eval's task, of the split whose answers are public
TASKS = {
    "OCRBench": "ocrbench",
    "DocVQA": "docvqa_val",
    "ChartQA": "chartqa",
    "InfoVQA": "infovqa_val",
    "TextVQA": "textvqa_val",
    "MMMU": "mmmu_val",
    "MMStar": "mmstar",
    "RealWorldQA": "realworldqa",
    "HallusionBench": "hallusion_bench_image",
    "POPE": "pope",
    "GQA": "gqa",
    "MME": "mme",
}


def command(model: str, k: int | None, tasks: Sequence[str], output: Path, more: Sequence[str] = ()) -> list[str]:
    """lmms-eval's command for one run; `k` None is the base, from all dense tokens."""
    about = [f"pretrained={model}"]
    about += ["from_base=True"] if k is None else [f"k={k}", f"cache={output / 'summaries'}"]
    folder = output / ("base" if k is None else f"k{k}")
    argv = [sys.executable, "-m", "lmms_eval", "--model", "llava_fwd2bot", "--model_args", ",".join(about)]
    return [*argv, "--tasks", ",".join(tasks), "--output_path", str(folder), "--log_samples", *more]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the checkpoint: a folder, a hub name or smol-llava")
    parser.add_argument("--k", type=int, nargs="+", required=True, help="numbers of summary tokens")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(TASKS)}, or lmms-eval's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="the first so many items of each task; for a try")
    parser.add_argument("--no-base", action="store_true", help="leave the base out")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    arguments = parser.parse_args(argv)
    tasks = [TASKS.get(name, name) for name in arguments.tasks]
    more = ["--batch_size", str(arguments.batch_size)]
    more += ["--limit", str(arguments.limit)] if arguments.limit is not None else []
    for k in [*([] if arguments.no_base else [None]), *arguments.k]:
        run = command(arguments.model, k, tasks, arguments.output, more)
        folder = Path(run[run.index("--output_path") + 1])
        if any(folder.rglob("*results.json")):
            print(f"{folder} has results: left as it is", flush=True)
            continue
        print(shlex.join(run), flush=True)
        if not arguments.dry_run and (code := subprocess.run(run).returncode):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
