"""Result files of the evaluators in one form: benchmark, model, number of tokens, score, and each item's score."""

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
HEADLINES = {"retrieval": "t2i_r1", "captioning": "cider"}  # of the others: the first score
DENSE = "dense"


@dataclass
class Result:
    """One score on a benchmark, by a model, from k tokens (an int, or "dense" for the base)."""

    benchmark: str
    metric: str
    model: str
    k: int | str
    value: float
    items: dict[str, float]  # score of each item
    is_mean: bool  # whether the score is the mean of the items, times `scale`
    scale: float
    limit: int | None
    groups: list[Any] | None  # the image of each item, in order
    of: str | None  # a digest of the items, if their keys are only numbers
    source: Path
    counts: Counts | None = None  # of a score that is not a mean of items

    @property
    def name(self) -> str:
        return f"{self.benchmark} ({self.metric})"


@dataclass
class Found:
    """Contents of result files: scores to compare, results of `cost` and `codec`, and files of neither kind."""

    results: list[Result] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
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
        try:
            if isinstance(content, dict) and content.get("evaluator") in WITH_TABLE and content.get("rows"):
                found.tables.append({**content, "file": str(file)})
            elif isinstance(content, dict) and content.get("per_item"):
                found.results += _of_file(content, file)
            elif file in paths:
                raise ValueError(f"{file} holds no result with its items: write it with --output of `fwd2bot eval`.")
            else:
                found.skipped.append(file)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result of `fwd2bot eval` ({type(error).__name__}: {error}).") from error
    if not found.results and not found.tables:
        where = ", ".join(map(str, paths))
        raise ValueError(f"There is no result with its items in {where}: write results with --output.")
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
    # points, F1 and similar scores are not a mean of items; their interval comes from counts, where the file holds them
    plain = any(abs(scale - s) < 1e-6 for s in (1.0, 100.0))
    model = str(content.get("model"))
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
    k = k if k == DENSE else int(k)
    if content.get("quantised"):
        model += f" ({content['quantised']})"
    groups = content.get("image_of_item")
    parts = content.get("parts")
    own = (content.get("limit"), groups, content.get("of"), file, None if parts is None else counts(parts))
    return Result(benchmark, metric, model, k, value, items, plain, scale, *own)


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
