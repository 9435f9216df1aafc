"""The one command for a GPU, on a CPU: the day a GPU is at hand, no line of it runs for the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_all(import_script):
    return import_script("gpu_all")


def read(path: Path) -> tuple[dict, str]:
    return json.loads((path / "gpu.json").read_text()), (path / "gpu.md").read_text()


def test_the_whole_script_on_a_cpu(tmp_path):
    """Each part does its work, and the table is the last thing said."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_all.sh"), str(tmp_path), "--device", "cpu", "--shape", "tiny", "--quick"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:] + (tmp_path / "gpu.log").read_text()[-3000:]
    report, table = read(tmp_path)
    assert {name: part["state"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("device", "train", "infer", "tests"), "done"
    )
    assert set(report["parts"]["train"]["result"]["by_batch"]) == {"1", "2"}
    assert {"1", "2"} == set(report["parts"]["infer"]["result"]["compress"]["16"])
    tests = report["parts"]["tests"]["tests"]
    assert len(tests) > 10 and set(tests.values()) == {"PASSED", "SKIPPED"}
    assert done.stdout.endswith(table)
    for words in ("training step", "first token", "compress", "host's LoRA", "tests (`pytest -m gpu`)", "torch 2."):
        assert words in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]


def test_a_part_that_fails_or_hangs_does_not_end_the_others(gpu_all, tmp_path, monkeypatch, capsys):
    """A GPU is there once: what one part breaks, the others are still measured, and the exit code tells."""
    child = tmp_path / "child"
    hang = (
        f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid))"
    )
    parts = [
        gpu_all.Part("train", ["-c", "raise RuntimeError('CUDA error: no kernel image')"], 60, 0),
        gpu_all.Part("infer", ["-c", hang + "; time.sleep(60)"], 3, 0),
        gpu_all.Part("device", ["-c", "print('well')"], 60, 0),
        gpu_all.Part("tests", ["-c", "print('tests/core/test_gpu.py::test_a PASSED [ 5%]')"], 60, 1000),
    ]
    monkeypatch.setattr(gpu_all, "_parts", lambda *_: parts)
    assert gpu_all.main([str(tmp_path / "out"), "--device", "cpu"]) == 1
    report, table = read(tmp_path / "out")
    states = {name: part["state"] for name, part in report["parts"].items()}
    assert states == {"train": "failed", "infer": "ended at its limit", "device": "done", "tests": "left out"}
    assert "RuntimeError: CUDA error: no kernel image" in table and "ended after 3 s" in table
    assert "it needs 1000" in table and table in capsys.readouterr().out
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # what the hanging part started is gone too


def test_tests_that_were_ended_are_told_from_those_that_passed(gpu_all, tmp_path):
    """A run of the tests that hangs still says which passed, which failed and where it stood."""
    states = ("test_a PASSED [ 5%]", "test_b[a b] FAILED [ 9%]", "test_c ")
    said = "FAILED tests/core/test_gpu.py::test_b[a b] - assert 1 == 2\n"
    said += "\n".join(f"tests/core/test_gpu.py::{state}" for state in states)
    part = gpu_all.Part("tests", ["-c", f"import time; print({said!r}, end='', flush=True); time.sleep(60)"], 3, 0)
    found = gpu_all._run(part, 3, tmp_path, tmp_path / "log")
    names = {name.partition("::")[2]: state for name, state in found["tests"].items()}
    assert names == {"test_a": "PASSED", "test_b[a b]": "FAILED", "test_c": "ENDED"}
    assert "test_c" in gpu_all.markdown(
        {"parts": {"tests": found}, "missing": {}, "date": "", "device": "", "command": ""}
    )
