"""The script of benchmarks by lmms-eval names tasks that are there, and the base beside every k."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from eval import lmms_suite


def test_task_names_are_lmms_evals():
    """A name that lmms-eval does not know would stop a run after hours."""
    tasks = pytest.importorskip("lmms_eval.tasks", reason="lmms-eval is not installed: pip install lmms-eval")
    known = set(tasks.TaskManager("ERROR").all_tasks)
    assert not set(lmms_suite.TASKS.values()) - known
    assert len(lmms_suite.TASKS) == 12


def test_base_and_every_k_are_run_on_the_same_tasks(monkeypatch, tmp_path, capsys):
    """Retention compares with the base on the same items, so its run is part of the script."""
    ran = []

    def run(argv):
        ran.append(argv)
        folder = Path(argv[argv.index("--output_path") + 1])
        folder.mkdir(parents=True)
        (folder / "1_results.json").write_text("{}")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", run)
    argv = ["--model", "smol-llava", "--k", "16", "1", "--output", str(tmp_path), "--tasks", "POPE", "gqa"]
    assert lmms_suite.main([*argv, "--limit", "3"]) == 0
    about = [one[one.index("--model_args") + 1] for one in ran]
    cache = f"cache={tmp_path / 'summaries'}"
    assert about == [
        "pretrained=smol-llava,from_base=True",
        f"pretrained=smol-llava,k=16,{cache}",
        f"pretrained=smol-llava,k=1,{cache}",
    ]
    assert all(one[one.index("--tasks") + 1] == "pope,gqa" and one[-2:] == ["--limit", "3"] for one in ran)
    assert lmms_suite.main(argv) == 0 and len(ran) == 3  # done is done
    assert "has results" in capsys.readouterr().out


def test_a_run_that_fails_stops_the_script(monkeypatch, tmp_path):
    """The exit status of lmms-eval is the script's, so that a shell script sees it."""
    monkeypatch.setattr(subprocess, "run", lambda argv: subprocess.CompletedProcess(argv, 3))
    assert lmms_suite.main(["--model", "m", "--k", "1", "--output", str(tmp_path)]) == 3
