"""Results as Markdown tables: plain column titles, and percentages with as many decimals as their items support."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# figure of a result → column title; `title` makes those of R@n
TITLES = {
    "accuracy": "accuracy",
    "bleu4": "BLEU-4 × 100",
    "cider": "CIDEr × 100",
    "spice": "SPICE × 100",
    "group": "group score",
    "image": "image score",
    "itt": "image-to-text accuracy",
    "text": "text score",
    "tot": "text-only accuracy",
}
DIRECTIONS = {"t2i": "text→image", "i2t": "image→text"}


def decimals(count: int) -> int:
    """Decimals of a percentage over `count` items: its standard error, at most 50 / √count, is below 16 of the last.

    None below 1,000 items, one below 100,000, two from there on.
    """
    return 0 if count < 1000 else 1 if count < 100_000 else 2


def percent(share: float, count: int) -> str:
    """A share in [0, 1] of `count` items as a percentage, without the sign."""
    return f"{100 * share:.{decimals(count)}f}"


def title(name: str) -> str:
    """The column title of a figure: `t2i_r1` → "text→image R@1"."""
    if found := re.fullmatch(r"(t2i|i2t)_r(\d+)", name):
        return f"{DIRECTIONS[found[1]]} R@{found[2]}"
    return TITLES.get(name, name.replace("_", " "))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of these columns, without a line end.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        if len(row) != len(titles):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(titles)} columns: {row}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def ranged(value: float, interval: Sequence[float], show: Callable[[float], str] = "{:.1f}".format) -> str:
    """A figure and its interval: `81.2 [80.1, 82.3]`."""
    return f"{show(value)} {between(interval, show)}"


def between(interval: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = interval
    return f"[{show(low)}, {show(high)}]"


def results_table(found: Mapping[str, Any]) -> str:
    """The rows of an evaluator's result as Markdown, with the number of items below."""
    rows = found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))

    def cell(row: Mapping[str, Any], name: str) -> str:  # not every row has every figure
        count = row["items_of_figure"].get(name, row["items"])
        return percent(row["figures"][name], count) if name in row["figures"] else ""

    cells = [[str(row["k"]), row["by"], *(cell(row, name) for name in names)] for row in rows]
    counts = ", ".join(f"{found[name]:,} {name}" for name in ("images", "captions", "tests") if found.get(name))
    return markdown(["k", "scored by", *map(title, names)], cells) + f"\n\nPercentages. n = {counts}." * bool(counts)
