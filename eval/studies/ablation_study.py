"""An ablation study as its YAML file describes it: rows to train, claims to judge, settings of each row."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_fwd2bot.files.text import read_text

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
