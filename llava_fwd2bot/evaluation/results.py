"""What evaluators and scorers find, in one form: in memory, in result files, and as the report reads them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.text import read_any_json, read_json
from .resample import Counts, counts

DENSE = "dense"


@dataclass
class Score:
    """Figures as the official script computes them, the main one first, and what each item adds to that one."""

    figures: dict[str, float]
    per_item: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # items of a figure, where they are not those of `per_item`
    groups: list[Any] | None = None  # the image of each item, if images have several items
    parts: dict[str, Any] | None = None  # what `resample.counts` takes, if the first figure is not a mean of items
    k: int | str | None = None  # number of summary tokens, or "dense"
    by: str = ""  # the way of scoring, where there are several
    empty: int = 0  # empty answers among the items
    submission: Any = None  # the file for the benchmark's server or scorer, if there is one
    submission_lines: bool = False  # whether the submission is JSON lines
    note: str | None = None  # a note on the submission

    def as_json(self) -> dict[str, Any]:
        """A row of a result file."""
        found: dict[str, Any] = {"k": self.k, "by": self.by, "figures": self.figures, "items": len(self.per_item)}
        found |= {"items_of_figure": self.counts, "per_item": self.per_item, "image_of_item": self.groups}
        return found | {name: value for name in ("parts", "empty") if (value := getattr(self, name))}


def digest(*texts: str) -> str:
    """A short hash of texts in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@dataclass
class Result:
    """The main figure of one `Score`, on a benchmark, by a model, from k tokens (an int, or "dense" for the base)."""

    benchmark: str
    metric: str
    model: str
    k: int | str
    value: float
    items: dict[str, float]  # score of each item
    scale: float | None  # the figure over the mean of the items; None: it is not a mean of them
    limit: int | None
    groups: list[Any] | None  # the image of each item, in order
    of: str | None  # a digest of the items, if their keys are only numbers
    source: Path
    counts: Counts | None  # of a figure that is not a mean of items

    @property
    def name(self) -> str:
        return f"{self.benchmark} ({self.metric})"


@dataclass
class Found:
    """Contents of result files, and files of another kind."""

    results: list[Result] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def read_results(paths: Sequence[Path]) -> Found:
    """The results in files, and in folders and all below them.

    A file of another kind is an error if `paths` names it, and is skipped in a folder.

    Raises:
        FileNotFoundError, ValueError: there is no result; a file is incomplete; two files hold the same score.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "There is no such result file or folder", str(path))
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    files = list({file.resolve(): file for file in files}.values())
    found = Found()
    for file in files:
        content = read_any_json(file)
        rows = _rows(content)
        if not rows and file in paths:
            raise ValueError(f"{file} holds no result with its items: write it with --output of `fwd2bot eval`.")
        if not rows:
            found.skipped.append(file)
        try:
            found.results += [_result(content, row, file) for row in rows if row["figures"]]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a result of this version of `fwd2bot eval` ({type(error).__name__}: {error}). If an "
                "earlier version wrote it, evaluate again."
            ) from error
    if not found.results:
        where = ", ".join(map(str, paths))
        raise ValueError(f"There is no result with its items in {where}: write results with --output.")
    seen: dict[tuple, Path] = {}
    for result in found.results:
        key = (result.name, result.model, result.k, result.limit)
        if key in seen:
            raise ValueError(f"{result.name} of {result.model}, k = {result.k}, is in {seen[key]} and {result.source}.")
        seen[key] = result.source
    return found


def _rows(content: Any) -> list[Any]:
    """The rows with items of a result file: of an evaluator, or the only one of `eval score`; [] for other files."""
    if not isinstance(content, dict):
        return []
    rows = content.get("rows", [content])
    return rows if content.get("per_item") or any(isinstance(r, dict) and r.get("per_item") for r in rows) else []


def _result(content: dict[str, Any], row: dict[str, Any], file: Path) -> Result:
    metric, value = next(iter(row["figures"].items()))
    items = {name: float(x) for name, x in row["per_item"].items()}
    average = sum(items.values()) / len(items)
    scale = value / average if average else 1.0
    # points, F1 and similar figures are no means of items; their interval comes from counts, where the file holds them
    is_mean = any(abs(scale - s) < 1e-6 for s in (1.0, 100.0))
    model, k = str(content.get("model")), row.get("k")
    if k is None:  # not written by LLaVA's own programs
        named = re.search(r"-k(\d+)$", model) or re.search(r"-k(\d+)$", file.stem)
        if named is None:
            raise ValueError(
                f"{file} does not say how many tokens {model} answered from: score again with --k J, or with --k "
                "dense for a base."
            )
        k = named[1]
    if k != DENSE and not str(k).isdecimal():
        raise ValueError(f"{file}: k is {k!r}, which is neither a number of tokens nor dense. Score again with --k.")
    how = [content[name] for name in ("quantised", "codec") if content.get(name) and (name != "codec" or k != DENSE)]
    return Result(
        benchmark=content["benchmark"] + (f" by {row['by']}" if row.get("by") else ""),
        metric=metric,
        model=model + (f" ({', '.join(how)})" if how else ""),
        k=k if k == DENSE else int(k),
        value=value,
        items=items,
        scale=scale if is_mean else None,
        limit=content.get("limit"),
        groups=row.get("image_of_item"),
        of=content.get("of"),
        source=file,
        counts=counts(row["parts"]) if row.get("parts") else None,
    )


def pair(result: Result, base: Result) -> tuple[list[float], list[float]]:
    """The item scores of both, in the same order.

    Raises:
        ValueError: the results are of different items.
    """
    same = result.items.keys() == base.items.keys() and result.limit == base.limit
    if not same or None not in (result.of, base.of) and result.of != base.of:
        raise ValueError(
            f"{result.source} and {base.source} are not of the same items of {result.name}: {len(result.items)} and "
            f"{len(base.items)}. Evaluate both on the same items."
        )
    names = list(base.items)
    return [result.items[n] for n in names], [base.items[n] for n in names]


def published() -> dict[str, Any]:
    """Published results, with their sources."""
    return read_json(Path(__file__).with_name("published.json"))


def published_of(result_name: str) -> tuple[list[tuple[str, int | None, float]], str]:
    """Published results on a benchmark and metric, on its scale: ([(method, tokens, score), …], source).

    The first is the base with 576 tokens. The list is empty if others report another metric.
    """
    known = published()
    name, _, metric = result_name.partition(" (")
    generation, retrieval = known["generation"], known["retrieval"]
    own, scale = generation["metrics"].get(name, ("", 1))
    if metric == f"{own})":
        rows = [row for row in (generation["base"], *generation["rows"]) if name in row]
        return [(row["method"], row["tokens"], row[name] / scale) for row in rows], generation["source"]
    data = name.removeprefix("retrieval ")
    rows = [row for row in retrieval["rows"] if data in row] if metric == "t2i_r1)" else []
    return [(row["method"], None, row[data][0] / 100) for row in rows], retrieval["source"]


def with_ending(output: Path, ending: str) -> Path:
    """The path with `ending` appended; unlike with_suffix it keeps dots in the name."""
    return output.with_name(output.name + ending)
