"""Result files of the evaluators, brought to one form: what was measured, by which model, from how many tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.text import read_any_json, read_json
from .resample import Counts, counts

EVALUATORS = ("retrieval", "captioning", "compositionality")
WITH_TABLE = ("cost", "codec")  # evaluators of one model: the report shows their own table
HEADLINES = {"retrieval": "t2i_r1", "captioning": "cider"}  # others: the first figure
DENSE = "dense"


@dataclass
class Result:
    """One figure: of a benchmark, of a model, from k tokens (an int, or "dense" for the base)."""

    benchmark: str
    metric: str
    model: str
    k: int | str
    value: float
    items: dict[str, float]  # what each item adds
    is_mean: bool  # whether the figure is the items' mean, times `scale`
    scale: float
    limit: int | None
    groups: list[Any] | None  # of each item, in their order, what it belongs to: its image
    of: str | None  # a digest of the items, where they are known by their number alone
    source: Path
    counts: Counts | None = None  # of a figure that is no mean of items

    @property
    def name(self) -> str:
        return f"{self.benchmark} ({self.metric})"


@dataclass
class Found:
    """What result files hold: figures to compare, tables of `cost` and `codec`, and the files of neither kind."""

    results: list[Result] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def read_results(paths: Sequence[Path]) -> Found:
    """The results in files, and in folders and all below them.

    A file of another kind is an error if `paths` names it, and is skipped in a folder.

    Raises:
        FileNotFoundError, ValueError: there is no result; a file is half-written; two files hold the same figure.
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
        try:
            if isinstance(content, dict) and content.get("evaluator") in WITH_TABLE and content.get("rows"):
                found.tables.append({**content, "file": str(file)})
            elif isinstance(content, dict) and content.get("per_item"):
                found.results += _of_file(content, file)
            elif file in paths:
                raise ValueError(f"{file} holds no result with its items: write it by --output of `fwd2bot eval`.")
            else:
                found.skipped.append(file)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no result of `fwd2bot eval` ({type(error).__name__}: {error}).") from error
    if not found.results and not found.tables:
        raise ValueError(f"There is no result with its items in {', '.join(map(str, paths))}: write them by --output.")
    seen: dict[tuple, Path] = {}
    for result in found.results:
        key = (result.name, result.model, result.k, result.limit)
        if key in seen:
            raise ValueError(f"{result.name} of {result.model}, k = {result.k}, is in {seen[key]} and {result.source}.")
        seen[key] = result.source
    return found


def _of_file(content: dict[str, Any], file: Path) -> list[Result]:
    if "figures" in content:  # of `eval score`
        if not content["figures"]:
            return []
        metric, value = next(iter(content["figures"].items()))
        return [_result(content, content["benchmark"], metric, content.get("k"), value, content["per_item"], file)]
    found, kind = [], content.get("evaluator")
    for row in content["rows"] if kind in EVALUATORS else []:
        name = content.get("dataset") or content.get("benchmark") or kind
        if content.get("split", "test") != "test":
            name += f"-{content['split']}"
        numbers = [n for n, value in row.items() if isinstance(value, float) and n not in ("seconds",)]
        metric = HEADLINES.get(kind, numbers[0])
        key = f"{row['by']} k={row['k']}" if kind != "captioning" else f"k={row['k']}"
        items = content["per_item"][key]
        if kind == "retrieval":
            items = [float(rank < 1) for rank in items]
        by = "" if row["by"] in ("pooled", "greedy") else f", {row['by']}"
        title = f"{kind} {name}{by}" if kind != "compositionality" else f"{name} by {row['by']}"
        items = {str(i): float(x) for i, x in enumerate(items)}
        found.append(_result(content, title, metric, row["k"], row[metric], items, file))
    return found


def _result(
    content: dict[str, Any], benchmark: str, metric: str, k: Any, value: float, items: dict[str, float], file: Path
) -> Result:
    average = sum(items.values()) / len(items)
    scale = value / average if average else 1.0
    # points, F1 and their like are no mean of items; their interval is made of counts, where the file holds them
    plain = any(abs(scale - s) < 1e-6 for s in (1.0, 100.0))
    model = str(content.get("model"))
    if k is None:  # LLaVA's own programs do not write it
        named = re.search(r"-k(\d+)$", model) or re.search(r"-k(\d+)$", file.stem)
        if named is None:
            raise ValueError(
                f"{file} does not say from how many tokens {model} answered: score again with --k J, or --k dense for "
                "a base."
            )
        k = named[1]
    if k != DENSE and not str(k).isdecimal():
        raise ValueError(f"{file}: k is {k!r}, neither a number of tokens nor dense. Score again with --k.")
    k = k if k == DENSE else int(k)
    if content.get("quantised"):
        model += f" ({content['quantised']})"
    groups = content.get("image_of_item")
    parts = content.get("parts")
    own = (content.get("limit"), groups, content.get("of"), file, None if parts is None else counts(parts))
    return Result(benchmark, metric, model, k, value, items, plain, scale, *own)


def pair(result: Result, base: Result) -> tuple[list[float], list[float]]:
    """The items of both, in one order.

    Raises:
        ValueError: they are not of the same items.
    """
    same = result.items.keys() == base.items.keys() and result.limit == base.limit
    if not same or None not in (result.of, base.of) and result.of != base.of:
        raise ValueError(
            f"{result.source} and {base.source} are not of the same items of {result.name}: {len(result.items)} and "
            f"{len(base.items)}. Evaluate both on the same."
        )
    names = list(base.items)
    return [result.items[n] for n in names], [base.items[n] for n in names]


def published() -> dict[str, Any]:
    """What others published, with its sources."""
    return read_json(Path(__file__).with_name("published.json"))


def published_of(result_name: str) -> tuple[list[tuple[str, int | None, float]], str]:
    """What others published of a benchmark and metric, on its scale: ([(method, tokens, figure), …], the source).

    The first is the base, of 576 tokens. None where they give another metric: a figure beside it would mislead.
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
    """NAME.json and the like; a NAME may have dots of its own."""
    return output.with_name(output.name + ending)
