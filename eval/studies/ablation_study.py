"""An ablation study as its YAML file describes it: rows to train, claims to judge, settings of each row."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_fwd2bot.files.text import read_text

from .rivals import RIVALS

FIGURES = ("answers", "few", "t2i", "t2i_hard", "hard", "attention")  # few: answers on pictures of up to FEW objects
FEW = 4
BASE = "base"


@dataclass
class Row:
    """A model to train.

    Attributes:
        k: the numbers of tokens to measure at. arguments: of `fwd2bot train`. method: one of eval/studies/rivals.py.
        captions: of each scene, to train with: short, long or both. seeds: instead of the study's seeds.
    """

    name: str
    k: list[int]
    arguments: str = ""
    method: str = "fwd2bot"
    captions: str = "both"
    seeds: list[int] | None = None


@dataclass
class Claim:
    """`better` is above `than` in `figure`; with a margin, at most `margin` below it."""

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
    capacity: list[str] = field(default_factory=list)  # rows whose answers are plotted by number of objects
    about: str = ""  # notes for the reader of the table

    @classmethod
    def read(cls, file: Path) -> Study:
        """Reads a study; raises ValueError if a name is unknown or a claim is about a missing row."""
        try:
            given = yaml.safe_load(read_text(file))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not YAML: {error}") from error
        try:
            rows = {name: Row(name, **(values or {})) for name, values in given.pop("rows").items()}
            claims = [Claim(**claim) for claim in given.pop("claims", [])]
            study = cls(rows=rows, claims=claims, **given)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a study: {error}. eval/studies/ablation.yaml is an example.") from error
        for row in rows.values():
            if row.method not in RIVALS or row.captions not in ("short", "long", "both") or row.name == BASE:
                raise ValueError(f"{file}: row {row.name!r} has an unknown method or captions, or a reserved name.")
            row.seeds = seeds = study.seeds if row.seeds is None else row.seeds
            if not isinstance(seeds, list) or not all(isinstance(x, int) for x in seeds) or len({*seeds}) < len(seeds):
                raise ValueError(f"{file}: row {row.name!r}: seeds must be distinct integers, got {seeds}.")
        if unknown := {*study.capacity} - {*rows}:
            raise ValueError(f"{file}: capacity names unknown rows: {sorted(unknown)}.")
        for claim in claims:
            unknown = {claim.better, claim.than} - {*rows, BASE}
            if unknown or claim.figure not in FIGURES:
                raise ValueError(f"{file}: {claim.says!r} names unknown {sorted(unknown) or claim.figure}.")
        return study

    def runs(self) -> list[tuple[str, int]]:
        """(row, seed) of all runs: the base first, then all rows seed by seed."""
        runs = [(row.name, seed) for row in self.rows.values() for seed in row.seeds]
        return [(BASE, 0), *sorted(runs, key=lambda run: run[1])]

    def command(self, row: Row) -> list[str]:
        """The training arguments of a row; its own override the common ones."""
        return [*shlex.split(self.common), *shlex.split(row.arguments)]

    def settings(self, row: Row) -> dict[str, Any]:
        """Everything besides the seed that a row's result depends on."""
        return {"scenes": self.scenes, "arguments": self.command(row), "method": row.method, "captions": row.captions}
