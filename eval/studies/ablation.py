"""The ablation study: one YAML of rows and claims, one command, a table and a picture.

    python -m eval.studies.ablation eval/studies/ablation.yaml --work DIR [--jobs 2] [--output eval/results/ablation]

Every row is trained on the scenes base for each seed, by the training command, and measured by scenes_measure.py.
A run that was stopped goes on where it was; rows and seeds that are done are not done again, be it in --work or,
on another machine, in OUTPUT.runs.json.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from llava_fwd2bot.cli.options import count
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.text import read_json, read_text
from llava_fwd2bot.files.writing import write_json

from .rivals import RIVALS

FIGURES = ("answers", "few", "t2i", "t2i_hard", "hard", "attention")  # `few`: answers on pictures of up to FEW objects
FEW = 4
BASE = "base"


@dataclass
class Row:
    """`method` is one of eval/studies/rivals.py. `captions`: which of a scene's train: short, long or both. `seeds`:
    its own instead of the study's, as a close comparison needs more."""

    name: str
    k: list[int]
    arguments: str = ""
    method: str = "fwd2bot"
    captions: str = "both"
    seeds: list[int] | None = None


@dataclass
class Claim:
    """`better` above `than` in `figure`; with a margin: not more than that below."""

    says: str
    figure: str
    better: str
    than: str
    margin: float = 0.0


@dataclass
class Study:
    scenes: dict[str, Any]
    seeds: list[int]
    common: str
    rows: dict[str, Row]
    claims: list[Claim] = field(default_factory=list)
    capacity: list[str] = field(default_factory=list)  # the rows whose answers are drawn by number of objects
    about: str = ""  # what a reader of the table should know

    @classmethod
    def read(cls, file: Path) -> Study:
        """Raises ValueError where a name is unknown, or a claim is about a row that is not there."""
        try:
            given = yaml.safe_load(read_text(file))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not YAML: {error}") from error
        try:
            rows = {name: Row(name, **(values or {})) for name, values in given.pop("rows").items()}
            claims = [Claim(**claim) for claim in given.pop("claims", [])]
            study = cls(rows=rows, claims=claims, **given)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no study: {error}. eval/studies/ablation.yaml shows the form.") from error
        for row in rows.values():
            if row.method not in RIVALS or row.captions not in ("short", "long", "both") or row.name == BASE:
                raise ValueError(f"{file}: row {row.name!r} has an unknown method or captions, or a taken name.")
            row.seeds = seeds = study.seeds if row.seeds is None else row.seeds
            if not isinstance(seeds, list) or not all(isinstance(x, int) for x in seeds) or len({*seeds}) < len(seeds):
                raise ValueError(f"{file}: row {row.name!r}: seeds must be whole numbers, each once, not {seeds}.")
        if unknown := {*study.capacity} - {*rows}:
            raise ValueError(f"{file}: capacity is about {sorted(unknown)}, which is not there.")
        for claim in claims:
            unknown = {claim.better, claim.than} - {*rows, BASE}
            if unknown or claim.figure not in FIGURES:
                raise ValueError(
                    f"{file}: {claim.says!r} is about {sorted(unknown) or claim.figure}, which is not there."
                )
        return study

    def runs(self) -> list[tuple[str, int]]:
        """Row and seed of all runs: the base's, then those of all rows with a seed before the next seed."""
        runs = [(row.name, seed) for row in self.rows.values() for seed in row.seeds]
        return [(BASE, 0), *sorted(runs, key=lambda run: run[1])]

    def command(self, row: Row) -> list[str]:
        """The training arguments of a row; of one that is given twice the row's own counts."""
        return [*shlex.split(self.common), *shlex.split(row.arguments)]

    def settings(self, row: Row) -> dict[str, Any]:
        """What a row's result depends on, besides its seed."""
        return {"scenes": self.scenes, "arguments": self.command(row), "method": row.method, "captions": row.captions}


def prepare(study: Study, work: Path) -> tuple[Path, Path]:
    """(scenes, base): made where they are missing."""
    from . import scenes, scenes_base

    data, base = work / "scenes", work / BASE
    about = study.scenes
    splits = {"train": about["train"], "test": about["test"]}
    if not data.exists():
        scenes.write(data, about["seed"], splits, tuple(about["objects"]))
    made = read_json(data / "about.json")
    wanted = {"seed": about["seed"], "splits": splits, "objects": about["objects"], "format": scenes.FORMAT}
    if {name: made.get(name) for name in wanted} != wanted:
        raise ValueError(f"{data} holds other scenes than the study asks for: choose another --work, or remove it.")
    if not (base / "recipe.json").exists():
        scenes_base.build(base, about["seed"], tuple(about["objects"]))
    recipe = read_json(base / "recipe.json")
    if [recipe["seed"], recipe["objects"]] != [about["seed"], about["objects"]]:
        raise ValueError(f"{base} was trained on other scenes than the study asks for: choose another --work.")
    for captions in {row.captions for row in study.rows.values()} - {"both"}:
        _with_captions(data, captions)
    return data, base


def _with_captions(data: Path, which: str) -> None:
    """train.json with one of each scene's captions; a scene of one object has the long one alone."""
    target = data / f"train.{which}.json"
    if target.exists():
        return
    records = list(read_records(data / "train.json"))
    for record in records:
        record["caption"] = record["caption"][:1] if which == "short" else record["caption"][-1:]
    write_json(target, records)


def folder_of(work: Path, row: str, seed: int) -> Path:
    return work / "runs" / row.replace(" ", "-") / str(seed)


def done(study: Study, work: Path, name: str, seed: int) -> dict[str, Any] | None:
    """The result of a row, or the base, and seed, if it is there.

    Raises:
        ValueError: it is of other settings.
    """
    file = folder_of(work, name, seed) / "result.json"
    if not file.exists():
        return None
    found, row = read_json(file), study.rows.get(name)
    if row is not None and (found["settings"] != study.settings(row) or found["k"] != row.k):
        raise ValueError(f"{file} was made with other settings than the study has now: remove {file.parent}.")
    return found


def run_one(study: Study, work: Path, name: str, seed: int) -> None:
    """Trains a row with a seed, unless it is trained, and measures it."""
    folder = folder_of(work, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    # a study that was killed leaves its runs going: the next waits for them, as two must not train in one folder
    with FileLock(folder / "lock"):
        if done(study, work, name, seed) is None:
            _run_one(study, work, name, seed, folder)


def _run_one(study: Study, work: Path, name: str, seed: int, folder: Path) -> None:
    from .readers import Images, open_reader
    from .scenes_measure import answers, attention, searched

    data, base = work / "scenes", work / BASE
    if name == BASE:
        reader = open_reader(BASE, base, torch.float32)
        images = Images(reader)
        result = {"answers": answers(reader, images, data, "test", [0])}
        result["attention"] = attention(reader, images, data, "test", 0)
        write_json(folder / "result.json", result)
        return
    row = study.rows[name]
    settings, begun = study.settings(row), folder / "settings.json"
    if begun.exists() and read_json(begun) != settings:
        raise ValueError(f"{folder} was begun with other settings than the study has now: remove it.")
    if not (folder / "fwd2bot_config.json").exists():
        from llava_fwd2bot.training.command import train

        write_json(begun, settings)
        records = data / ("train.json" if row.captions == "both" else f"train.{row.captions}.json")
        command = ["--model_name_or_path", str(base), "--data_path", str(records)]
        command += ["--image_folder", str(data / "images"), "--output_dir", str(folder), "--seed", str(seed)]
        command += ["--save_steps", "200", "--save_total_limit", "1", "--logging_steps", "50"]
        command += ["--report_to", "none", "--disable_tqdm", "True"]
        train([*command, *study.command(row)], host=RIVALS[row.method])
    reader = open_reader(row.method, folder, torch.float32)
    result = {"settings": settings, "seed": seed, "k": row.k, "torch": torch.__version__}
    images = Images(reader)
    result["answers"] = answers(reader, images, data, "test", row.k)
    if reader.model.fwd2bot_config.contrastive_weight > 0 or row.method == "fwd2bot":
        result |= searched(reader, images, data, "test", row.k)
    if row.method in ("fwd2bot", "shared"):
        result["attention"] = attention(reader, images, data, "test", max(row.k))
    write_json(folder / "result.json", result)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def run(
    study: Study, file: Path, work: Path, jobs: int, only: Iterable[str] = (), after: Callable[[], None] | None = None
) -> list[str]:
    """All rows and seeds, `jobs` at a time, each a process of its own; gives what failed.

    Args:
        only: these rows alone. after: called after each run.
    """
    prepare(study, work)
    runs = [(name, seed) for name, seed in study.runs() if not only or name in (BASE, *only)]
    todo = [one for one in runs if done(study, work, *one) is None]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failed = []

    def start(name: str, seed: int) -> None:
        folder = folder_of(work, name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            FileLock(folder / "lock").acquire(timeout=0).lock.release()
        except Timeout:
            tqdm.write(f"{name}, seed {seed}: still trained by a process of an earlier call, which is waited for")
        command = [sys.executable, "-m", "eval.studies.ablation", str(file), "--work", str(work)]
        with (folder / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            command += ["--one", name, "--seed", str(seed)]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc="ablation", unit="run") as bar:
        waiting = {pool.submit(start, *one): one for one in todo}
        for future in as_completed(waiting):
            name, seed = waiting[future]
            if future.exception() is not None:
                failed.append(f"{name}, seed {seed}: see {folder_of(work, name, seed) / 'log.txt'}")
                bar.write(f"failed: {failed[-1]}")
            elif after is not None:
                after()
            bar.update()
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="runs, checkpoints and logs; kept to go on from")
    parser.add_argument(
        "--output",
        type=Path,
        help="writes OUTPUT.json, .md and .png; and .runs.json and .base, by which it goes on in another --work",
    )
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--report", action="store_true", help="train nothing: the table of what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    study = Study.read(args.study)
    if args.one:
        run_one(study, args.work, args.one, args.seed)
        return 0
    from .ablation_report import report
    from .ablation_runs import gather, scatter

    if unknown := {*args.only} - {*study.rows}:
        parser.error(f"--only: there is no row {', '.join(sorted(unknown))}")

    def keep() -> None:
        if args.output is not None:
            gather(study, args.work, args.output)

    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        scatter(study, args.output, args.work)
    failed = [] if args.report else run(study, args.study, args.work, args.jobs, args.only, keep)
    keep()
    print(report(study, args.work, args.output))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
