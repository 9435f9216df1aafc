"""Runs the tests and the benchmarks that want a GPU, each in its own process and time, and makes one table of them.

    bash scripts/gpu_all.sh OUT_DIR --minutes 9

The most important come first; what the time does not reach is named in the table. A part that fails is named there too,
does not end the others, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_report import markdown

ROOT = Path(__file__).parents[1]
SPARE = 5.0  # seconds at the end, for the table
GRACE = 40.0  # between the time that a benchmark is told and the time at which it is ended; its imports are in it
MISSING = {
    "bitsandbytes": "4-bit and 8-bit bases",
    "deepspeed": "ZeRO",
    "flash_attn": "flash-attention's own package (torch's flash kernel is tested)",
}
PYTEST = ["-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "-m", "gpu"]
TEST_LINE = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


@dataclass
class Part:
    """One process. `seconds` is its budget, `least` what must be left for it to be worth a start."""

    name: str
    argv: list[str]
    seconds: float
    least: float
    environment: dict[str, str] = field(default_factory=dict)
    told_time: bool = False  # whether it takes `--seconds`


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    end = time.monotonic() + 60 * options.minutes - SPARE
    options.out_dir.mkdir(parents=True, exist_ok=True)
    log = options.out_dir / "gpu.log"
    log.write_text("")
    told = " ".join(["bash scripts/gpu_all.sh OUT_DIR", *(sys.argv[1:] if argv is None else argv)[1:]])
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": told,
        "device": str(options.device),
        "missing": {name: what for name, what in MISSING.items() if find_spec(name) is None},
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for part in _parts(options, Path(scratch)):
            left = end - time.monotonic()
            if left < part.least:
                found = {"state": "left out", "why": f"{max(left, 0):.0f} s were left, it needs {part.least:.0f}"}
            else:
                found = _run(part, min(part.seconds, left), Path(scratch), log)
            report["parts"][part.name] = found
            _write(report, options.out_dir)
            print(f"{part.name}: {found['state']}" + (f" ({found['why']})" if "why" in found else ""), flush=True)
    print(markdown(report))
    return int(any(found["state"] in ("failed", "ended at its limit") for found in report["parts"].values()))


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out_dir", type=Path, help="takes gpu.md, gpu.json and gpu.log")
    options.add_argument("--minutes", type=float, default=9, help="of the whole; the last parts are left out at need")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--shape", choices=("7b", "toy", "tiny"), default="7b")
    options.add_argument(
        "--quick", action="store_true", help="few rounds of small batches: whether it runs, not how fast"
    )
    options.add_argument("--only", nargs="+", choices=("device", "train", "infer", "tests"), help="these parts alone")
    return options


def _parts(options: argparse.Namespace, scratch: Path) -> list[Part]:
    """In order of importance: the device's peak, which takes seconds, is what the others are read beside."""

    def bench(name: str, seconds: float, least: float, *argv: str) -> Part:
        told = ["--device", options.device, "--dtype", "bfloat16", "--output", str(scratch / f"{name}.json")]
        path = str(ROOT / "scripts" / f"bench_{name}.py")
        return Part(name, [path, *told, *argv], seconds, least, told_time=name != "device")

    shape = ("--shape", options.shape)
    if options.quick:
        wanted = ["-k", "not compiled"]
        sizes = ["--matrix", "256", "--copy-mib", "16", "--rounds", "2"]
        train = ["--batch", "1", "2", "--steps", "1", "--memory", "beside"]
        infer = ["--batch", "1", "2", "--compress-batch", "1", "2", "--rounds", "1", "--new-tokens", "2"]
    else:
        sizes, wanted = [], []
        train = ["--batch", "1", "8", "16", "32", "--steps", "7"]
        infer = ["--batch", "1", "32", "--compress-batch", "1", "8", "32", "--rounds", "9", "--new-tokens", "32"]
    tested = {"FWD2BOT_TEST_DEVICE": options.device, "FWD2BOT_TEST_FACTS": str(scratch / "facts")}
    parts = [
        bench("device", 90, 20, *sizes),
        bench("train", 170, 70, *shape, *train, "--k", "16", "--fit"),
        bench("infer", 150, 60, *shape, *infer, "--k", "16", "--adapters", "base"),
        # what may compile for long, or hang, stands last in the file
        Part("tests", ["-m", "pytest", *PYTEST, *wanted, "tests/core/test_gpu.py"], 180, 30, tested),
    ]
    return [part for part in parts if options.only is None or part.name in options.only]


def _run(part: Part, seconds: float, scratch: Path, log: Path) -> dict[str, Any]:
    """Runs a part for `seconds` at most; what it wrote by then counts, also where it failed."""
    argv, output, facts = [sys.executable, *part.argv], scratch / f"{part.name}.json", scratch / "facts"
    if part.told_time:
        argv += ["--seconds", f"{max(seconds - GRACE, 1):.0f}"]
    environment = {**os.environ, **part.environment}
    start, out = time.monotonic(), scratch / f"{part.name}.out"
    with out.open("wb") as sink:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = out.read_text(encoding="utf-8", errors="replace")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"===== {part.name}: {' '.join(argv)}\n{said}\n")
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if code == 0:
        found["state"] = "done"
    else:
        found["state"] = "failed" if code is not None else "ended at its limit"
        found["why"] = _reason(said, code, seconds)
    if output.exists():
        found["result"] = json.loads(output.read_text(encoding="utf-8"))
    if part.name == "tests":
        found["tests"] = dict(TEST_LINE.findall(said))
        if code is None:
            found["tests"].update(dict.fromkeys(re.findall(r"^(tests/\S+?::\S.*?) *\Z", said, re.MULTILINE), "ENDED"))
        found["failed"] = dict(re.findall(r"^(?:FAILED|ERROR) (tests/\S+?::.+?) - (.+)$", said, re.MULTILINE))
        found["facts"] = [json.loads(line) for line in facts.read_text().splitlines()] if facts.exists() else []
        found["skipped"] = re.findall(r"^SKIPPED \[\d+\] \S+ (.+)$", said, re.MULTILINE)
    return found


def _reason(said: str, code: int | None, seconds: float) -> str:
    """The line that tells most of why a process failed."""
    if code is None:
        return f"ended after {seconds:.0f} s"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b", line)]
    last = (errors or lines or ["it said nothing"])[-1]
    return f"exit code {code}: {last[:300]}" if code > 0 else f"signal {-code}: {last[:300]}"


def _write(report: dict[str, Any], out_dir: Path) -> None:
    """Both files anew, each written beside and renamed: what was measured stays whatever happens next."""
    for name, text in (("gpu.json", json.dumps(report, indent=1) + "\n"), ("gpu.md", markdown(report) + "\n")):
        (out_dir / f"{name}.new").write_text(text, encoding="utf-8")
        os.replace(out_dir / f"{name}.new", out_dir / name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that what runs is ended as well
    sys.exit(main())
