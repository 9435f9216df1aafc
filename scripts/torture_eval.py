"""Kills an evaluator at random moments and lets it go on: is the result file the same as of a run that was left alone?

    python scripts/torture_eval.py --kills 10 retrieval --model my-fwd2bot --dataset pairs.jsonl --images DIR

What follows the options is what follows `fwd2bot eval`; --work and --output are added.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHANGING = ("date", "seconds", "work", "answers", "answered_before")  # of a run, and not of what it found


def start(command: list[str], work: Path, output: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "llava_fwd2bot.cli.main",
        "eval",
        *command,
        "--work",
        str(work),
        "--output",
        str(output),
    ]
    if command[4] == "answer":
        command += ["--answers", str(work / "answers.jsonl")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def found(output: Path) -> dict[str, Any]:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(x) for name, x in value.items() if name not in CHANGING}
        return [kept(x) for x in value] if isinstance(value, list) else value

    return kept(json.loads(output.read_text()))


def torture(command: list[str], kills: int, folder: Path) -> dict[str, Any]:
    """AssertionError where the result files differ. A run that gets to its end is compared, and begun anew."""
    (folder / "alone").mkdir()
    began = time.perf_counter()
    assert start(command, folder / "alone", folder / "alone.json").wait() == 0, "the evaluator fails by itself"
    whole, killed, compared = time.perf_counter() - began, 0, 0
    while True:
        (folder / "killed").mkdir(exist_ok=True)
        process = start(command, folder / "killed", folder / "killed.json")
        if killed < kills:
            time.sleep(whole * random.uniform(0.2, 0.9))
            if process.poll() is None:
                process.kill()
                process.wait()
                killed += 1
                continue
        assert process.wait() == 0, "it does not go on"
        compare(folder)
        compared += 1
        if killed == kills:
            return {"kills": killed, "runs_compared": compared, "same": True, "seconds_alone": round(whole, 1)}
        shutil.rmtree(folder / "killed")
        (folder / "killed.json").unlink()


def compare(folder: Path) -> None:
    alone, killed = found(folder / "alone.json"), found(folder / "killed.json")
    assert alone == killed, f"the results differ in {[n for n in {*alone, *killed} if alone.get(n) != killed.get(n)]}"
    answers = [folder / name / "answers.jsonl" for name in ("alone", "killed")]
    if all(file.exists() for file in answers):
        # a run that goes on has other batches, so that the order is another
        said = [sorted(file.read_text().splitlines()) for file in answers]
        assert said[0] == said[1], "the answers differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"command": args.command[0], **torture(args.command, args.kills, Path(folder))}))


if __name__ == "__main__":
    main()
