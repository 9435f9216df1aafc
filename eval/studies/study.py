"""A study as its YAML file describes it: what is compared, on what, and what is claimed.

eval/studies/smol.yaml is an example.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_fwd2bot.files.text import read_text

LAYOUTS = ("by k", "by figure")
BASE = "base"


@dataclass
class Row:
    """A model that is measured.

    Attributes:
        k: the numbers of tokens, instead of the study's; 0 is all dense tokens. seeds, tasks: instead of the study's.
        arguments: of `fwd2bot train`, after the study's `common`. method: one of eval/studies/rivals.py.
        model: a checkpoint that is not trained by the study.
        settings: what a study with a training loop of its own needs.
    """

    name: str
    k: list[int] | None = None
    seeds: list[int] | None = None
    tasks: list[str] | None = None
    arguments: str = ""
    method: str = "fwd2bot"
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Figure:
    """How a task, or TASK/PART, is shown: times `scale`, with `decimals`, or with as many as its items support."""

    title: str
    scale: float = 100
    decimals: int | None = None


@dataclass
class Claim:
    """Each of `ours` is above each of `others` in each figure, at each k that both have.

    Attributes:
        margin: how far it may be below, as a share. factor: `others` have so many times as many tokens.
        k: the only k of ours. against: the only k of theirs. ratio: ours over theirs, which is above 1.
        family: of the claims whose p are corrected together.
    """

    says: str
    figures: list[str]
    ours: list[str]
    others: list[str]
    margin: float = 0.0
    factor: int = 1
    k: int | None = None
    against: int | None = None
    ratio: bool = False
    family: str = ""


@dataclass
class Table:
    """Figures of rows: by k has one table per figure with a column per k, by figure a column per figure.

    Attributes:
        show: of each figure: value, interval, range (over seeds), share (of the base) and "share interval".
        rows, k: instead of all.
    """

    title: str
    figures: list[str]
    layout: str = "by k"
    show: list[str] = field(default_factory=lambda: ["value"])
    rows: list[str] | None = None
    k: list[int] | None = None


@dataclass
class Study:
    title: str
    rows: dict[str, Row]
    figures: dict[str, Figure]
    module: str | None = None  # makes the base and the items; None: the study can only be reported
    about: str = ""  # stands before the tables
    common: str = ""
    base: str = BASE  # the row that shares are of
    k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seeds: list[int] = field(default_factory=lambda: [0])
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    claim_decimals: int | None = None
    picture: dict[str, Any] = field(default_factory=dict)  # picture.py
    name: str = ""

    @classmethod
    def read(cls, file: Path) -> Study:
        """Reads a study.

        Raises:
            ValueError: it is no study, or a name in it is unknown.
        """
        try:
            given = yaml.safe_load(read_text(file))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not YAML: {error}") from error
        try:
            rows = {name: Row(name, **(values or {})) for name, values in given.pop("rows").items()}
            figures = {
                name: Figure(values) if isinstance(values, str) else Figure(**values)
                for name, values in given.pop("figures").items()
            }
            tables = [Table(**table) for table in given.pop("tables", [])]
            claims = [Claim(**claim) for claim in given.pop("claims", [])]
            study = cls(rows=rows, figures=figures, tables=tables, claims=claims, name=file.stem, **given)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a study: {error}. eval/studies/smol.yaml is an example.") from error
        for row in rows.values():
            row.k = study.k if row.k is None else row.k
            row.seeds = seeds = study.seeds if row.seeds is None else row.seeds
            if not isinstance(seeds, list) or not all(isinstance(x, int) for x in seeds) or len({*seeds}) < len(seeds):
                raise ValueError(f"{file}: row {row.name!r}: seeds must be distinct integers, got {seeds}.")
        for says, part, named in study._names():
            if unknown := sorted({*named} - {*(figures if part == "figures" else rows)}):
                raise ValueError(f"{file}: {says!r} names unknown {part}: {', '.join(unknown)}.")
        if wrong := {table.layout for table in tables} - {*LAYOUTS}:
            raise ValueError(f"{file}: a table's layout is {' or '.join(LAYOUTS)}, not {', '.join(wrong)}.")
        return study

    def _names(self) -> list[tuple[str, str, list[str]]]:
        """(where, "rows" or "figures", names) of all that is named in tables, claims and the picture."""
        found = [(part.title, "rows", part.rows or []) for part in self.tables]
        found += [(part.title, "figures", part.figures) for part in self.tables]
        found += [(claim.says, "rows", [*claim.ours, *claim.others]) for claim in self.claims]
        found += [(claim.says, "figures", claim.figures) for claim in self.claims]
        return [*found, ("picture", "figures", self.picture.get("figures", []))]

    def command(self, row: Row) -> list[str]:
        """The training arguments of a row; its own override the common ones."""
        return [*shlex.split(self.common), *shlex.split(row.arguments)]

    def runs(self) -> list[tuple[str, int]]:
        """(row, seed) of all runs, seed by seed."""
        return sorted(((row.name, seed) for row in self.rows.values() for seed in row.seeds), key=lambda run: run[1])
