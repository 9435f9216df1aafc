"""Table and picture of eval/studies/smol.py, from its result files."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from llava_fwd2bot.evaluation import tables
from llava_fwd2bot.evaluation.drawing import panels, plain, png, powers, pyplot
from llava_fwd2bot.evaluation.resample import bootstrap
from llava_fwd2bot.evaluation.results import with_ending
from llava_fwd2bot.evaluation.tables import percent
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_bytes, write_json, write_text
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
    "coco": "text→image R@1, COCO val2017",
    "sugarcrepe": "SugarCrepe",
}
ORDER = ("base", "fwd2bot", "shared", "pool", "query", "kv", "prune", "mean", "last")
STEPS = {"fwd2bot": 540, "prune": 0}  # of training; every other method had
SHORT = 60
HEAD = """# smol-llava: Fwd2Bot and other ways to make k tokens of an image

## Read this first

- **Average pooling (`pool`) is level with Fwd2Bot (`fwd2bot-short`) at equal training**: captions between -0.8 and
  +1.7 points of CIDEr, yes/no questions 0.4 to 1.3 points for Fwd2Bot. With twice as many tokens pooling is level or
  ahead, in captions by up to 2.3 points.
- **Without our residual, as in the paper, and with this little training (`fwd2bot-plain`), it is behind pooling** in
  captions by 2.3, 4.9 and 8.2 points at k = 1, 4 and 16, and behind the summary tokens' keys and values (`kv`) by 2.5,
  4.4 and 4.3.
- **The k outputs of the language model are nearly one vector.** In the packaged checkpoint, 0.14 of the variance of
  the language model's part between images differs from token to token; the averages that are added to it make up the
  rest.
- **Two columns hardly measure vision.** Answering DAQUAR by a lookup of the question's text alone scores 18 %, and
  the base 16 %. Answering yes/no questions with each text's most frequent answer scores 75.8 %, with a wrong image
  62.4 %, and the base 91.2 %. Averaging 49 tokens to 16 without any training keeps 97 % of the base's CIDEr.
- **Equal schedules only.** `fwd2bot` is the packaged checkpoint and had 540 steps; every other trained method had 60.
  Compare them with `fwd2bot-short`.
- Each trained method has one seed, and the other methods' learning rates were not tuned.

The figures of the third and the fourth point were measured separately; their result files are not in this repository.

## What the methods are

The packaged checkpoint, `fwd2bot`, had 540 steps of 24 rows. The others had 60 steps of 24 rows of the same data
(`scripts/train_smol_llava.sh DATA WORK rivals`); `prune` is not trained. `eval/studies/rivals.py` and
`eval/studies/readers.py` implement them.

| method | what it is | losses |
|---|---|---|
| `fwd2bot-short` | Fwd2Bot with our residual, the first token as the search vector | both, distillation |
| `fwd2bot-answer` | the same | answer, distillation |
| `fwd2bot-contrastive` | the same | contrastive |
| `shared` | the same with one adapter for both passes | both, distillation |
| `fwd2bot-plain` | without our residual, the mean of the tokens as the search vector | both, distillation |
| `pool` | average pooling of the grid to k tokens | answer, distillation |
| `query` | k learned queries, a transformer on the dense tokens | answer, distillation |
| `kv` | keys and values at the summary tokens, one pass (VoCo-LLaMA's kind) | answer, distillation |
| `prune` | the k dense tokens with the most attention (FastV's kind) | none |
| `mean` | one search vector: mean-pooled dense tokens with a learned head | contrastive |
| `last` | one search vector: the last token of a prompt (VladVA's kind) | contrastive |

## Figures

n is the number of images (CIDEr), questions or captions. In brackets: the 95 % interval by bootstrap over the images,
each with all its questions or captions. The percentage after it is the share of the base's figure. Retrieval by
`fwd2bot` and its variants with the first token as the vector is the same at every k. Made by
`python -m eval.studies.smol`.

"""
CLAIMS = """
## Differences

Differences on the same items, in points, with 95 % intervals by paired bootstrap. Bold: the interval excludes 0. Above
0 the first-named is ahead. Every trained method in these tables had 60 steps.

"""
Results = dict[str, dict[str, dict[int, dict[str, Any]]]]  # task, method, k
Images = Callable[[str], Sequence[Any]]  # of a task, the image of each item


def read_results(work: Path) -> Results:
    """Every result file in `work`.

    Raises:
        ValueError: there is none, or they were made with different --limit or --tuning.
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
    """One entry per task, method and k: scores, interval of the main score, and retention with its interval."""
    rows = []
    for task, methods in results.items():
        groups = images_of(task)
        base = methods.get("base", {}).get(0)
        for method in sorted(methods, key=_place):
            for k, result in sorted(methods[method].items()):
                row = {"task": task, "method": method, "k": k, "items": len(result["items"]), **result["figures"]}
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
        base = [f"Base, all dense tokens: {_cell(row)}" for row in mine if row["method"] == "base"]
        lines = []
        for method in sorted({r["method"] for r in mine} - {"base"}, key=_place):
            own = [r for r in mine if r["method"] == method]
            lines.append([method, *smol_claims.cells_of(own, ks, _cell)])
        table = tables.markdown(["method", *(f"k = {k}" for k in ks)], lines)
        parts += [f"### {TITLES[task]} (n = {mine[0]['items']:,})", *base, table]
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any]) -> str:
    share = f", {percent(row['retention'], row['items'])} %" if "retention" in row else ""
    return tables.ranged(row["value"], row["interval"], partial(percent, count=row["items"])) + share


def picture(rows: list[dict[str, Any]]) -> bytes:
    """A PNG of the main score over k: a line per method with 95 % intervals, the base as a horizontal line.

    Methods of the same schedule are in colour; those trained for longer are grey and dotted.
    """
    tasks = [task for task in HEADLINE if any(row["task"] == task for row in rows)]
    figure, axes = panels(len(tasks), (4.6, 3.6))
    methods = sorted({r["method"] for r in rows} - {"base"}, key=_place)
    palette = pyplot().get_cmap("tab10").colors
    styles = {}
    for i, method in enumerate(methods):
        variant = (
            method.startswith("fwd2bot-") or method == "shared"
        ) and method != "fwd2bot-short"  # variants of ours are dashed
        style = {"color": palette[i % 10], "linestyle": "--" if variant else "-", "marker": "os^Dv"[i // 5 % 5]}
        style["linewidth"] = 2.4 if method == "fwd2bot-short" else 1.2
        if STEPS.get(method, SHORT) > SHORT:
            style |= {"color": "0.6", "linestyle": ":", "markerfacecolor": "white"}
        styles[method] = style
    for axis, task in zip(axes, tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for row in (r for r in mine if r["method"] == "base"):
            axis.axhline(100 * row["value"], color="black", linestyle="--", linewidth=1, label="base, dense")
        for i, (method, style) in enumerate(styles.items()):
            line = [row for row in mine if row["method"] == method]
            if line:
                values = [100 * row["value"] for row in line]
                # where all items are equal, rounding can put the value outside its interval
                low = [max(0.0, value - 100 * row["interval"][0]) for value, row in zip(values, line, strict=True)]
                high = [max(0.0, 100 * row["interval"][1] - value) for value, row in zip(values, line, strict=True)]
                # offset, so that intervals do not overlap
                ks = [row["k"] * 1.025 ** (i - len(styles) / 2) for row in line]
                axis.errorbar(ks, values, yerr=[low, high], markersize=4, elinewidth=0.6, label=_label(method), **style)
        powers(axis, sorted({row["k"] for row in mine if row["k"]}))
        axis.set(title=TITLES[task], xlabel="tokens per image")
        plain(axis)
    found = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    handles = {label: found[label] for label in ("base, dense", *map(_label, methods)) if label in found}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False)
    longer = ", ".join(method for method in methods if STEPS.get(method, SHORT) > SHORT)
    if longer:
        note = f"Equal schedule: {SHORT} steps each, prune none. {longer} (grey) had more: not an equal comparison."
        figure.text(0.5, 0.995, note, ha="center", va="top", fontsize=10)
    figure.tight_layout(rect=(0, 0.14, 1, 0.97))
    return png(figure)


def _label(method: str) -> str:
    return f"{method}, {STEPS.get(method, SHORT)} steps"


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
    write_json(with_ending(output, ".json"), {**about, "results": rows, "claims": claims})
    write_text(with_ending(output, ".md"), HEAD + markdown(rows) + CLAIMS + smol_claims.markdown(claims, TITLES))
    write_bytes(with_ending(output, ".png"), picture(rows))
