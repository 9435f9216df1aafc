"""Table, claims and picture of an ablation study, from the result files of its runs."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from eval.statistics import over_seeds
from llava_fwd2bot.evaluation import tables
from llava_fwd2bot.evaluation.drawing import plain, png, pyplot
from llava_fwd2bot.evaluation.results import DENSE, with_ending
from llava_fwd2bot.files.writing import write_bytes, write_json, write_text

from .ablation import done
from .ablation_study import BASE, FEW, Claim, Study


def collect(study: Study, work: Path) -> dict[str, list[dict[str, Any]]]:
    """The results of each row by seed, the base first; rows without results are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, seed in study.runs():
        if (result := done(study, work, name, seed)) is not None:
            found.setdefault(name, []).append(result)
    if not found:
        raise ValueError(f"There is no result in {work}: run the study first.")
    return {name: found[name] for name in (BASE, *study.rows) if name in found}


def items_of(results: list[dict[str, Any]], figure: str, k: int | None = None) -> np.ndarray | None:
    """[seeds, items] of a figure at the row's largest k, or at `k`; None if the row lacks it."""
    if figure == "attention":
        values = [result.get("attention") for result in results]
    else:
        values = []
        for result in results:
            part = result["answers"]["k"] if figure in ("answers", "few") else result.get(figure)
            if part is None or (k is not None and str(k) not in part):
                values.append(None)
                continue
            own = part[str(k) if k is not None else max(part, key=int)]
            if figure == "few":
                own = [x for x, count in zip(own, result["answers"]["objects"], strict=True) if count <= FEW]
            values.append([x for kind in own.values() for x in kind] if figure == "hard" else own)
    return None if any(v is None for v in values) else np.asarray(values, dtype=float)


def pictures_of(results: list[dict[str, Any]], figure: str) -> np.ndarray:
    """The picture of each item, [items]; questions about one picture are not independent."""
    if figure in ("answers", "few"):
        answers = results[0]["answers"]
        few = [figure == "answers" or count <= FEW for count in answers["objects"]]
        return np.asarray(answers["images"])[few]
    if figure == "hard":
        return np.asarray([i for own in results[0]["hard_images"].values() for i in own])
    return np.arange(items_of(results, figure).shape[1])


def judge(claim: Claim, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The verdict on a claim: it holds, is refuted, or is open."""
    verdict: dict[str, Any] = {"claim": claim.says, "figure": claim.figure, "better": claim.better, "than": claim.than}
    sides = [items_of(found[name], claim.figure) if name in found else None for name in (claim.better, claim.than)]
    if sides[0] is None or sides[1] is None:
        return {**verdict, "verdict": "not measured"}
    ours, theirs = sides
    low, high = over_seeds(ours, theirs, pictures_of(found[claim.better], claim.figure))
    verdict |= {"difference": float(ours.mean() - theirs.mean()), "interval": [low, high], "margin": claim.margin}
    holds, refuted = low > -claim.margin, high < -claim.margin
    return {
        **verdict,
        "verdict": "holds" if holds else "refuted" if refuted else "open",
        "seeds": [len(ours), len(theirs)],
    }


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line per row and k: means over seeds and items, and the range over seeds."""
    base = found.get(BASE)
    lines = []
    for name, results in found.items():
        for k in sorted(map(int, results[0]["answers"]["k"])):
            each = items_of(results, "answers", k).mean(1)
            line: dict[str, Any] = {
                "row": name,
                "k": k or "dense",
                "seeds": len(results),
                "answers": float(each.mean()),
            }
            line["answers_spread"] = [float(each.min()), float(each.max())]
            if base is not None and name != BASE:
                for figure, title in (("answers", "retention"), ("few", "retention_few")):
                    ours, theirs = items_of(results, figure, k), items_of(base, figure)
                    if not theirs.any():
                        continue
                    line[title] = float(ours.mean() / theirs.mean())
                    pictures = pictures_of(results, figure)
                    line[f"{title}_interval"] = over_seeds(ours, theirs, pictures, ratio=True)
            kinds = results[0]["answers"]["kinds"]
            all_items = items_of(results, "answers", k).mean(0)
            for kind in dict.fromkeys(kinds):
                line[kind] = float(np.mean([x for x, own in zip(all_items, kinds, strict=True) if own == kind]))
            for figure in ("t2i", "t2i_hard", "hard"):
                values = items_of(results, figure, k)
                if values is not None:
                    line[figure] = float(values.mean())
            lines.append(line)
    return lines


def capacity(found: dict[str, list[dict[str, Any]]], row: str) -> dict[str, dict[int, float]]:
    """Accuracy by number of objects, for each k of a row: {"row, k = …": {objects: accuracy}}."""
    results = found[row]
    counts = np.asarray(results[0]["answers"]["objects"])
    curves = {}
    for k in sorted(map(int, results[0]["answers"]["k"])):
        items = items_of(results, "answers", k).mean(0)
        curves[f"{row}, k = {k}" if k else DENSE] = {
            int(n): float(items[counts == n].mean()) for n in np.unique(counts)
        }
    return curves


def label(name: str) -> str:
    """What a bar or a curve is called; a row that is named for its k does not say it twice: `k 1, k = 1` → `k = 1`."""
    return re.sub(r"^k (\d+), (k = \1)$", r"\2", name)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


FIGURES = """## Figures

{date}. All figures are percentages, means over items and seeds. Answers: in brackets the range over the seeds. \
Share of the base's answers: in brackets the 95 % bootstrap interval over pictures and seeds; for one seed only over \
pictures. With hard negatives: the gallery also has a copy of each that differs in one object.

"""
COLUMNS = ["row", "k", "seeds", "answers", "share of base", f"share of base, ≤ {FEW} objects"]
COLUMNS += ["attribute", "count", "existence", "relation", "text→image R@1", "with hard negatives", "hard captions"]


def markdown(
    lines: list[dict[str, Any]], verdicts: list[dict[str, Any]], curves: dict[str, Any], about: str = ""
) -> str:
    text = "# Ablation on scenes\n\n"
    text += f"## Read this first\n\n{about.strip()}\n\n" if about else ""
    text += FIGURES.format(date=date.today()) + tables.markdown(COLUMNS, map(_row, lines)) + "\n\n## Claims\n\n"
    text += tables.markdown(["claim", "seeds", "difference", "95 % interval", "verdict"], map(_verdict, verdicts))
    if curves:
        counts = sorted({n for curve in curves.values() for n in curve})
        rows = [[label(name), *(_percent(curve.get(n)) for n in counts)] for name, curve in curves.items()]
        text += "\n\n## Answers by number of objects\n\n" + tables.markdown(["row", *map(str, counts)], rows)
    return text + "\n"


def _row(line: dict[str, Any]) -> list[str]:
    spread = " " + tables.between(line["answers_spread"], _percent) if line["seeds"] > 1 else ""
    cells = [line["row"], str(line["k"]), str(line["seeds"]), _percent(line["answers"]) + spread]
    for name in ("retention", "retention_few"):
        drawn = " " + tables.between(line[f"{name}_interval"], _percent) if name in line else ""
        cells.append(_percent(line.get(name)) + drawn)
    names = ("attribute", "count", "existence", "relation", "t2i", "t2i_hard", "hard")
    return [*cells, *(_percent(line.get(name)) for name in names)]


def _verdict(v: dict[str, Any]) -> list[str]:
    shown = span = ""
    if "difference" in v:
        unit = " % of attention" if v["figure"] == "attention" else " points"
        shown = f"{100 * v['difference']:+.2f}{unit}"
        span = tables.between([100 * x for x in v["interval"]], "{:+.2f}".format)
    allowed = f", margin {100 * v['margin']:.1f}" if v.get("margin") else ""
    sides = f"{v['claim']}: {v['better']} against {v['than']}, {v['figure']}"
    return [sides, " against ".join(map(str, v.get("seeds", []))), shown, span, v["verdict"] + allowed]


def longer_than_most(lines: list[dict[str, Any]]) -> list[bool]:
    """Whether each row was trained for more steps than most, so that it is not an equal comparison."""
    steps = [line.get("steps", 0) for line in lines]
    usual = max(set(steps), key=steps.count)
    return [own > usual for own in steps]


def picture(lines: list[dict[str, Any]], curves: dict[str, dict[int, float]]) -> bytes:
    """A PNG: rows as bars with the range over seeds, and the capacity curves. Rows with more steps are grey."""
    plt = pyplot()
    shown = [line for line in lines if line["row"] != BASE]
    figure, axes = plt.subplots(1, 3, figsize=(14, 0.32 * len(shown) + 1.8), width_ratios=[1, 1, 0.9])
    names = [label(f"{line['row']}, k = {line['k']}") for line in shown]
    places = range(len(shown))
    for axis, name, title in ((axes[0], "answers", "answers"), (axes[1], "t2i", "text→image R@1")):
        values = [100 * line.get(name, float("nan")) for line in shown]
        axis.barh(
            places, values, color=["0.7" if longer else "#4878a8" for longer in longer_than_most(shown)], height=0.7
        )
        axis.set_yticks(places, names if name == "answers" else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("%" + ("; grey: trained for longer, not an equal comparison" if name == "answers" else ""))
    for place, line in zip(places, shown, strict=True):
        axes[0].plot([100 * x for x in line["answers_spread"]], [place, place], color="black", linewidth=1.5)
    for line in lines:
        if line["row"] == BASE:
            axes[0].axvline(100 * line["answers"], color="black", linestyle="--", linewidth=1, label="base")
            axes[0].legend(fontsize=8, frameon=False)
    for name, curve in curves.items():
        style = {"color": "black", "linestyle": "--"} if name == DENSE else {"marker": "o", "markersize": 4}
        axes[2].plot(list(curve), [100 * x for x in curve.values()], label=label(name), **style)
    axes[2].set(xlabel="objects in the picture", ylabel="answers right, %")
    axes[2].set_title("how much a summary holds", fontsize=10)
    axes[2].legend(fontsize=8, frameon=False)
    for axis in axes:
        plain(axis)
    figure.tight_layout()
    return png(figure)


def report(study: Study, work: Path, output: Path | None) -> str:
    """The Markdown; with `output`, also OUTPUT.json, .md and .png."""
    found = collect(study, work)
    lines = rows_of(found)
    for line in lines:
        if line["row"] != BASE:
            arguments = study.command(study.rows[line["row"]])
            line["steps"] = int(arguments[len(arguments) - arguments[::-1].index("--max_steps")])
    verdicts = [judge(claim, found) for claim in study.claims]
    curves: dict[str, dict[int, float]] = {}
    for row in (BASE, *study.capacity):
        curves |= capacity(found, row) if row in found else {}
    text = markdown(lines, verdicts, curves, study.about)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: study.settings(row) for name, row in study.rows.items()}
        seeds = {name: row.seeds for name, row in study.rows.items()}
        content = {"date": str(date.today()), "seeds": seeds, "settings": settings, "rows": lines}
        write_json(with_ending(output, ".json"), {**content, "claims": verdicts, "capacity": curves})
        write_text(with_ending(output, ".md"), text)
        write_bytes(with_ending(output, ".png"), picture(lines, curves))
    return text
