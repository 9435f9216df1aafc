"""Result files of the evaluators, brought to one form: what was measured, by which model, from how many tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fwd2bot.config import read_json

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
    items: dict[str, float] | None  # what each item adds, where the figure is their mean (times a scale)
    scale: float
    limit: int | None
    source: Path

    @property
    def name(self) -> str:
        return f"{self.benchmark} ({self.metric})"


def read_results(paths: Sequence[Path]) -> list[Result]:
    """The results in files, and in folders and all below them.

    Raises:
        FileNotFoundError, ValueError: there is none; a file is half-written; the same figure is there twice.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "There is no such result file or folder", str(path))
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found: list[Result] = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no whole JSON ({error}): was writing cut off? Evaluate again.") from None
        if isinstance(content, dict) and content.get("per_item"):
            found += _of_file(content, file)
    if not found:
        raise ValueError(f"There is no result with its items in {', '.join(map(str, paths))}: write them by --output.")
    seen: dict[tuple, Path] = {}
    for result in found:
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
    found = []
    for row in content["rows"]:
        kind = content["evaluator"]
        name = content.get("dataset") or content.get("benchmark") or kind
        numbers = [n for n, value in row.items() if isinstance(value, float) and n not in ("seconds",)]
        metric = HEADLINES.get(kind, numbers[0])
        key = f"{row['by']} k={row['k']}" if kind != "captioning" else f"k={row['k']}"
        items = content["per_item"][key]
        if kind == "retrieval":
            items = [float(rank < 1) for rank in items]
        by = "" if row["by"] in ("pooled", "greedy") else f", {row['by']}"
        title = f"{kind} {name}{by}" if kind != "compositionality" else f"{name} by {row['by']}"
        items = {str(i): x for i, x in enumerate(items)}
        found.append(_result(content, title, metric, row["k"], row[metric], items, file))
    return found


def _result(
    content: dict[str, Any], benchmark: str, metric: str, k: Any, value: float, items: dict[str, float], file: Path
) -> Result:
    average = sum(items.values()) / len(items) if items else 0.0
    scale = value / average if average else 1.0
    # points, F1 and their like are no mean of items, and get no interval
    plain = bool(items) and any(abs(scale - s) < 1e-6 for s in (1.0, 100.0))
    model = str(content.get("model"))
    if k is None:
        named = re.search(r"-k(\d+)$", model) or re.search(r"-k(\d+)$", file.stem)
        k = int(named[1]) if named else DENSE
    return Result(benchmark, metric, model, k, value, items if plain else None, scale, content.get("limit"), file)


def pair(result: Result, base: Result) -> tuple[list[float], list[float]]:
    """The items of both, in one order.

    Raises:
        ValueError: they are not of the same items.
    """
    if result.items.keys() != base.items.keys() or result.limit != base.limit:
        raise ValueError(
            f"{result.source} and {base.source} are not of the same items of {result.name}: {len(result.items)} and "
            f"{len(base.items)}. Evaluate both on the same."
        )
    names = list(base.items)
    return [result.items[n] for n in names], [base.items[n] for n in names]


def published() -> dict[str, Any]:
    """What others published, with its sources."""
    return read_json(Path(__file__).with_name("published.json"))
