"""The table and the picture of eval/smol.py, out of its result files."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from llava_fwd2bot.config import read_json, write_bytes, write_json, write_text
from llava_fwd2bot.evaluation.drawing import png, pyplot
from llava_fwd2bot.evaluation.metrics import bootstrap
from llava_fwd2bot.evaluation.results import beside
from llava_fwd2bot.version import __version__

from . import smol_claims

HEADLINE = {
    "caption": "cider",
    "exists": "accuracy",
    "daquar": "exact",
    "retrieval": "t2i_r1",
    "coco": "t2i_r1",
    "sugarcrepe": "accuracy",
}
TITLES = {
    "caption": "CIDEr, Flickr8k dev",
    "exists": "yes/no accuracy",
    "daquar": "DAQUAR, exact",
    "retrieval": "text→image R@1, Flickr8k dev",
    "coco": "text→image R@1, COCO val2017 (283)",
    "sugarcrepe": "SugarCrepe (426)",
}
ORDER = ("base", "fwd2bot", "shared", "pool", "query", "kv", "prune", "mean", "last")
HEAD = """# smol-llava: the base, Fwd2Bot, and the field's other ways to make k tokens of an image

Made by `python -m eval.studies.smol`. In brackets the 95 % interval, by bootstrap over the images, each with all
its questions or captions; the percentage is what is kept of the base's figure. `fwd2bot` is the checkpoint in the
package (540 steps of 24 rows). All others that are trained had 60 steps of 24 rows of the same data
(`scripts/train_smol_llava.sh DATA WORK rivals`): `fwd2bot-short` with both losses, `fwd2bot-answer` and
`fwd2bot-contrastive` with one of them, `shared` with one adapter for both passes, `fwd2bot-plain` without our residual
and with the mean of its tokens, not the first, as the vector; `pool`, `query` and `kv` with answer loss and
distillation, `mean` and `last` with the contrastive loss. `prune` is not trained. eval/rivals.py and eval/readers.py
say what each is.

"""
CLAIMS = """
## What follows from it

Differences on the same items, in points, with 95 % intervals by paired bootstrap; bold where the interval excludes no
difference. Above zero the first-named is ahead. All that are trained had the short schedule.

"""
Results = dict[str, dict[str, dict[int, dict[str, Any]]]]  # task, method, k
Images = Callable[[str], Sequence[Any]]  # of a task, the image of each item


def read_results(work: Path) -> Results:
    """Every result file in `work`.

    Raises:
        ValueError: there is none, or they were made with different `--limit`s.
    """
    found: Results = defaultdict(lambda: defaultdict(dict))
    limits, paths = set(), {}
    for file in sorted(work.glob("*.k*.json")):
        result = read_json(file)
        found[result["task"]][result["method"]][result["k"]] = result
        limits.add((result["limit"], result["tuning"]))
        known = paths.setdefault(result["method"], result["path"])
        if known != result["path"]:
            raise ValueError(f"{work} holds results of {result['method']} from {known} and {result['path']}: keep one.")
    if not found:
        raise ValueError(f"{work} holds no results yet: give --run METHOD=PATH")
    if len(limits) > 1:
        raise ValueError(f"{work} holds results of different --limit and --tuning ({limits}): use one folder for each")
    return found


def summarise(results: Results, images_of: Images) -> list[dict[str, Any]]:
    """One entry per task, method and k: the figures, the headline's interval, and retention with its interval."""
    rows = []
    for task, methods in results.items():
        groups = images_of(task)
        base = methods.get("base", {}).get(0)
        for method in sorted(methods, key=_place):
            for k, result in sorted(methods[method].items()):
                row = {"task": task, "method": method, "k": k, **result["figures"]}
                row["value"] = result["figures"][HEADLINE[task]]
                row["interval"] = bootstrap(result["items"], groups=groups)
                if base is not None and method != "base" and base["figures"][HEADLINE[task]]:
                    row["retention"] = row["value"] / base["figures"][HEADLINE[task]]
                    row["retention_interval"] = bootstrap(result["items"], base["items"], groups=groups)
                rows.append(row)
    return rows


def _place(method: str) -> tuple[int, str]:
    kind = method.split("-")[0]
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), method)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table per task: a row per method, a column per k."""
    parts = []
    for task in HEADLINE:
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        ks = sorted({row["k"] for row in mine if row["k"]})
        lines = [f"### {TITLES[task]}", "", "| method | " + " | ".join(f"k = {k}" for k in ks) + " |"]
        lines.append("|---|" + "---|" * len(ks))
        for row in (r for r in mine if r["method"] == "base"):
            lines.insert(1, f"\nBase, all dense tokens: {_cell(row)}")
        for method in sorted({r["method"] for r in mine} - {"base"}, key=_place):
            cells = {r["k"]: _cell(r) for r in mine if r["method"] == method}
            lines.append(f"| {method} | " + " | ".join(cells.get(k, "") for k in ks) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    text = f"{100 * row['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return text + (f", {100 * row['retention']:.1f} %" if "retention" in row else "")


def picture(rows: list[dict[str, Any]]) -> bytes:
    """Headline figure against k, a line per method, the base as a level; bars are 95 % intervals: a PNG."""
    plt = pyplot()
    tasks = [task for task in HEADLINE if any(row["task"] == task for row in rows)]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    methods = sorted({r["method"] for r in rows} - {"base"}, key=_place)
    palette = plt.get_cmap("tab10").colors
    styles = {}
    for i, method in enumerate(methods):
        variant = method.startswith("fwd2bot-") or method == "shared"  # ours but for one thing: dashed
        style = {"color": palette[i % 10], "linestyle": "--" if variant else "-", "marker": "os^Dv"[i // 5 % 5]}
        styles[method] = style | {"linewidth": 2.4 if method == "fwd2bot" else 1.2}
    for axis, task in zip(axes.flat, tasks, strict=False):
        mine = [row for row in rows if row["task"] == task]
        for row in (r for r in mine if r["method"] == "base"):
            axis.axhline(100 * row["value"], color="black", linestyle="--", linewidth=1, label="base, dense")
        for i, (method, style) in enumerate(styles.items()):
            line = [row for row in mine if row["method"] == method]
            if line:
                values = [100 * row["value"] for row in line]
                low = [value - 100 * row["interval"][0] for value, row in zip(values, line, strict=True)]
                high = [100 * row["interval"][1] - value for value, row in zip(values, line, strict=True)]
                # beside each other, so that one interval does not hide the next
                ks = [row["k"] * 1.025 ** (i - len(styles) / 2) for row in line]
                axis.errorbar(ks, values, yerr=[low, high], markersize=4, elinewidth=0.6, label=method, **style)
        ks = sorted({row["k"] for row in mine if row["k"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set(title=TITLES[task], xlabel="tokens per image")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    found = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    handles = {label: found[label] for label in ("base, dense", *methods) if label in found}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return png(figure)


def report(work: Path, output: Path, images_of: Images) -> None:
    """Writes `output`.json, .md and .png."""
    results = read_results(work)
    rows, claims = summarise(results, images_of), smol_claims.claims(results, images_of)
    about = {
        "date": date.today().isoformat(),
        "versions": {
            "llava_fwd2bot": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "python": platform.python_version(),
        "intervals": "95 %, bootstrap over images with all their items, paired for retention and differences",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside(output, ".json"), {**about, "results": rows, "claims": claims})
    write_text(beside(output, ".md"), HEAD + markdown(rows) + CLAIMS + smol_claims.markdown(claims, TITLES))
    write_bytes(beside(output, ".png"), picture(rows))
