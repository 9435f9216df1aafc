"""Runs a study: trains its rows by `fwd2bot train` and measures them, one process per row and seed.

Finished rows are taken from the results file, so that a stopped study resumes, also on another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llava_fwd2bot.cache.summary_file import fingerprint_of
from llava_fwd2bot.checkpoint.load import base_source
from llava_fwd2bot.extras import require
from llava_fwd2bot.files.regular import file_digest
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.hosts.opening import is_checkpoint, local_folder

from .rivals import RIVALS
from .rows import Key, Rows
from .study import Row, Study


@dataclass
class Job:
    """One row of a study with one seed.

    Attributes:
        data: the folder of photographs. work: of checkpoints and logs. limit: only the first items of each task.
        tuning: the items held out for choosing settings.
    """

    study: Study
    row: Row
    seed: int
    data: Path
    work: Path
    limit: int | None = None
    tuning: bool = False
    _digests: dict[str, str | None] = field(default_factory=dict, repr=False)

    @cached_property
    def module(self) -> Any:
        return module_of(self.study)

    @property
    def folder(self) -> Path:
        return self.work / "runs" / self.row.name.replace(" ", "-") / str(self.seed)

    @property
    def model(self) -> str:
        return self.row.model or str(self.folder)

    def keys(self) -> list[Key]:
        tasks = self.module.TASKS if self.row.tasks is None else self.row.tasks
        return [(task, self.row.name, k, self.seed) for task in tasks for k in self.row.k]

    def about(self, task: str) -> dict[str, Any]:
        """What a result depends on."""
        return {**self._settings, "data": self._contents(task)}

    @property
    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"limit": self.limit, "tuning": self.tuning}
        if self.row.model is None:
            found["arguments"] = self.study.command(self.row)
        return {**found, **self._weights}

    @cached_property
    def _weights(self) -> dict[str, str]:
        """Of a checkpoint that is there; one that is trained anew may keep its path."""
        if self.row.model is None and not is_trained(self.folder):
            return {}
        folder = local_folder(self.model, {})
        if self.row.method not in ("base", "prune") and is_checkpoint(folder):
            return {"fingerprint": fingerprint_of(folder)}
        files = sorted(Path(base_source(self.model)).glob("*.safetensors"))
        return {"weights": hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()[:16]}

    def _contents(self, task: str) -> str | None:
        if task not in self._digests:
            self._digests[task] = self.module.contents(self, task)
        return self._digests[task]

    def missing(self, rows: Rows) -> list[Key]:
        """The cells that are not there.

        Raises:
            ValueError: one was made of something else.
        """
        found = [key for key in self.keys() if not rows.has(key, self._settings)]
        for key in self.keys():  # settings first, as a digest of the items reads all images
            if key not in found:
                rows.has(key, {"data": self._contents(key[0])})
        return found


def module_of(study: Study) -> Any:
    return None if study.module is None else import_module(study.module)


def is_trained(folder: Path) -> bool:
    return (folder / "fwd2bot_config.json").exists()


def run_one(job: Job, rows: Rows) -> None:
    """Trains a row with a seed unless it is trained, and measures what is missing."""
    job.folder.mkdir(parents=True, exist_ok=True)
    # runs of a killed study continue; the next study waits for them, as two must not train in one folder
    with require("filelock", "cache", "A study").FileLock(job.folder / "lock"):
        rows.read()
        if not job.missing(rows):
            return
        if job.row.model is None:
            _train(job)
            job = replace(job)  # whose checkpoint is there now
        job.module.measure(job, rows, job.missing(rows))


def _train(job: Job) -> None:
    command, begun = job.study.command(job.row), job.folder / "settings.json"
    settings = {"arguments": command, "method": job.row.method}
    if begun.exists() and read_json(begun) != settings:
        raise ValueError(f"{job.folder} was started with other settings than the study has now: remove it.")
    if is_trained(job.folder):
        return
    from llava_fwd2bot.training.command import train

    write_json(begun, settings)
    given = [part.format(work=job.work, data=job.data) for part in command]
    given += ["--output_dir", str(job.folder), "--seed", str(job.seed), "--report_to", "none", "--disable_tqdm", "True"]
    train(given, host=RIVALS[job.row.method])
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def run(file: Path, jobs: Sequence[Job], rows: Rows, options: Sequence[str], workers: int = 1) -> list[str]:
    """Runs what is missing of all jobs, `workers` at a time; returns a message for each that failed.

    Args:
        file: the study's. options: of the command that runs one row.
    """
    jobs[0].module.prepare(jobs[0])
    todo = [job for job in jobs if job.missing(rows)]
    threads, failed = max(1, (os.cpu_count() or 1) // workers), []

    def start(job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        one = ["--one", json.dumps([job.row.name, job.seed])]
        command = [sys.executable, "-m", "eval.studies", "run", str(file), *options, *one]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (job.folder / "log.txt").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(todo), desc=jobs[0].study.name, unit="run") as bar:
        waiting = {pool.submit(start, job): job for job in todo}
        for future in as_completed(waiting):
            job = waiting[future]
            if future.exception() is not None:
                failed.append(f"{job.row.name}, seed {job.seed}: see {job.folder / 'log.txt'}")
                bar.write(f"failed: {failed[-1]}")
            bar.update()
    return failed
