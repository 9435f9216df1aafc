"""Paired differences between two methods on the same items, with intervals.

All methods here had the same short schedule (see smol_report.py), so that only the method differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llava_fwd2bot.evaluation import tables
from llava_fwd2bot.evaluation.resample import bootstrap
from llava_fwd2bot.evaluation.tables import decimals

OURS = "fwd2bot-short"
ANSWERED, SEARCHED = ("caption", "exists", "daquar"), ("retrieval", "coco", "sugarcrepe")
RIVALS = ("pool", "query", "kv", "prune")


@dataclass(frozen=True)
class Claim:
    """OURS against each of `others` on `tasks`; with `factor` 2, `others` have twice as many tokens."""

    name: str
    others: tuple[str, ...]
    tasks: tuple[str, ...]
    factor: int = 1
    ratio: bool = False


CLAIMS = (
    Claim("Against other methods, at the same k", RIVALS, ANSWERED),
    Claim(
        "Against other methods with twice as many tokens (the columns give the k of `fwd2bot-short`)",
        RIVALS,
        ANSWERED,
        factor=2,
    ),
    Claim("Both losses against the answer loss alone", ("fwd2bot-answer",), ANSWERED),
    Claim("Both losses against the contrastive loss alone", ("fwd2bot-contrastive",), SEARCHED),
    Claim("Two adapters against one", ("shared",), ANSWERED + SEARCHED),
    Claim(
        "Our residual and the first token as the vector, against no residual and the mean",
        ("fwd2bot-plain",),
        ANSWERED + SEARCHED,
    ),
    Claim("Retrieval, as a ratio to the baselines", ("mean", "last"), ("retrieval", "coco"), ratio=True),
)


def compare(results: Any, claim: Claim, images_of: Callable[[str], Sequence[Any]]) -> list[dict[str, Any]]:
    """One entry per task, other method and common k: difference (or ratio) of the main scores, with its interval.

    Args:
        results: task → method → k → result, as `smol_report.read_results` gives them.
        images_of: returns the image of each item of a task; all items of an image are resampled together.
    """
    rows = []
    for task in claim.tasks:
        methods = results.get(task, {})
        groups = images_of(task) if OURS in methods else None
        for other in claim.others:
            for k, mine in sorted(methods.get(OURS, {}).items()):
                # a baseline with one vector per image has one k
                theirs = methods.get(other, {}).get(1 if claim.ratio else k * claim.factor)
                if theirs is None or claim.ratio and (k != 1 or not any(theirs["items"])):
                    continue
                a, b = mine["items"], theirs["items"]
                if len(a) != len(b):
                    raise ValueError(f"{task}: {OURS} has {len(a)} items, {other} {len(b)}")
                if claim.ratio:
                    value, interval = sum(a) / sum(b), bootstrap(a, b, groups=groups)
                else:
                    differences = [x - y for x, y in zip(a, b, strict=True)]
                    value, interval = sum(differences) / len(a), bootstrap(differences, groups=groups)
                row = {"task": task, "against": other, "k": k, "items": len(a)}
                rows.append({**row, "value": value, "interval": interval})
    return rows


def claims(results: Any, images_of: Callable[[str], Sequence[Any]]) -> list[dict[str, Any]]:
    """Every claim with results."""
    found = [{"claim": c.name, "ours": OURS, "ratio": c.ratio, "rows": compare(results, c, images_of)} for c in CLAIMS]
    return [entry for entry in found if entry["rows"]]


def markdown(entries: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """A table per claim; bold if the interval excludes 0 (for a ratio: 1)."""
    parts = []
    for entry in entries:
        ks = sorted({row["k"] for row in entry["rows"]})
        unit = "ratio" if entry["ratio"] else "points"
        pairs = dict.fromkeys((row["task"], row["against"]) for row in entry["rows"])
        lines = []
        for task, other in pairs:
            mine = [row for row in entry["rows"] if (row["task"], row["against"]) == (task, other)]
            lines.append([titles[task], f"`{other}`", *cells_of(mine, ks, partial(_cell, ratio=entry["ratio"]))])
        heads = [f"`{entry['ours']}`, {unit}", "against", *(f"k = {k}" for k in ks)]
        parts += [f"### {entry['claim']}", tables.markdown(heads, lines)]
    return "\n\n".join(parts) + "\n"


def cells_of(rows: list[dict[str, Any]], ks: Sequence[int], show: Callable[[dict[str, Any]], str]) -> list[str]:
    """A cell for each of `ks`; where several have one value, it is that of the first token's vector, measured once."""
    cells = {row["k"]: show(row) for row in rows}
    if len(rows) > 1 and len({row["value"] for row in rows}) == 1:
        cells = {k: cell if k == min(cells) else "the same" for k, cell in cells.items()}
    return [cells.get(k, "") for k in ks]


def _cell(row: dict[str, Any], ratio: bool) -> str:
    low, high = row["interval"]
    if ratio:
        text, certain = tables.ranged(row["value"], row["interval"], "{:.2f}".format), not low <= 1 <= high
    else:
        places = decimals(row["items"])
        text = tables.ranged(row["value"], row["interval"], lambda x: f"{100 * x:+.{places}f}")
        certain = not low <= 0 <= high
    return f"**{text}**" if certain else text
