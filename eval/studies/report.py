"""The report of a study: its figures and claims as JSON, as one page of Markdown, and as one picture.

    python -m eval.studies report eval/studies/smol.yaml [--results eval/results]

Reads NAME.rows.jsonl of the results folder and writes NAME.json, NAME.md and NAME.png beside it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from eval.statistics import over_seeds
from llava_fwd2bot.evaluation.results import with_ending
from llava_fwd2bot.evaluation.tables import between, decimals, markdown
from llava_fwd2bot.files.writing import write_bytes, write_json, write_text

from .compare import Scores, judge
from .picture import picture
from .rows import Rows
from .study import Study, Table

INTERVALS = """Intervals hold 95 %, by bootstrap over pictures with all their items, and over seeds where there are \
several."""
VERDICTS = """Differences are paired, with their 95 % intervals. A claim holds or is refuted where p < 0.05, by a test \
over pictures and seeds, after Holm's correction for all comparisons on this page. These are bold. Above 0 ours is \
ahead."""
Line = dict[str, Any]


def summarise(study: Study, scores: Any) -> dict[str, Any]:
    """All figures of all rows, and the verdict on every comparison.

    Args:
        scores: `Scores`, or a study's own with the same methods.
    """
    lines = [line for row in study.rows for figure in study.figures for line in _lines(study, scores, figure, row)]
    return {"study": study.name, "figures": lines, "claims": judge(study, scores)}


def _lines(study: Study, scores: Any, figure: str, row: str) -> list[Line]:
    lines = []
    shared = {name for table in study.tables if "share" in table.show for name in table.figures}
    for k in scores.ks(figure, row):
        value = scores.value(figure, row, k)
        if value is None:
            continue
        line: Line = {"figure": figure, "row": row, "k": k, "value": value}
        line["interval"] = list(scores.interval(figure, row, k))
        items = scores.items(figure, row, k)
        if items is not None:
            line |= {"items": items.shape[1], "seeds": len(items)}
            line["range"] = [float(items.mean(1).min()), float(items.mean(1).max())]
            bound = None
            if row != study.base and figure in shared:
                bound = scores.items(figure, study.base, 0)
                bound = scores.items(figure, study.base, k) if bound is None else bound
            if bound is not None and bound.any():
                line["share"] = value / float(bound.mean())
                line["share_interval"] = list(over_seeds(items, bound, scores.groups(figure), ratio=True))
        lines.append(line)
    return lines


def page(study: Study, found: dict[str, Any], extra: str = "") -> str:
    """The page of Markdown.

    Args:
        found: as of `summarise`. extra: a study's own sections, after its tables.
    """
    parts = [f"# {study.title}", study.about.strip(), "## Figures", INTERVALS]
    for table in study.tables:
        make = _by_k if table.layout == "by k" else _by_figure
        parts += make(study, table, found["figures"])
    parts += [extra.strip()] if extra else []
    if found["claims"]:
        parts += ["## Claims", VERDICTS, *_claims(study, found)]
    return "\n\n".join(parts) + "\n"


def _shown(study: Study, table: Table, lines: list[Line], figure: str) -> list[Line]:
    """The lines of a figure that a table shows, in the study's order of rows."""
    order = {name: i for i, name in enumerate(study.rows if table.rows is None else table.rows)}
    mine = [line for line in lines if line["figure"] == figure and line["row"] in order]
    mine = [line for line in mine if table.k is None or line["k"] in table.k]
    return sorted(mine, key=lambda line: (order[line["row"]], line["k"]))


def _by_k(study: Study, table: Table, lines: list[Line]) -> list[str]:
    """A table for each figure: a row per row, a column per k."""
    parts = []
    for figure in table.figures:
        mine = _shown(study, table, lines, figure)
        if not mine:
            continue
        ks = sorted({line["k"] for line in mine})
        rows = []
        for row in dict.fromkeys(line["row"] for line in mine):
            own = [line for line in mine if line["row"] == row]
            rows.append([row, *_cells(own, ks, partial(_cell, study, table))])
        counts = {f"{line['items']:,}" for line in mine if "items" in line}
        count = f" (n = {counts.pop()})" if len(counts) == 1 else ""
        heads = ["", *(f"k = {k}" if k else "dense" for k in ks)]
        parts += [f"### {_title(study, table, figure)}{count}", markdown(heads, rows)]
    return parts


def _title(study: Study, table: Table, figure: str) -> str:
    return " ".join(filter(None, (table.title, study.figures[figure].title)))


def _by_figure(study: Study, table: Table, lines: list[Line]) -> list[str]:
    """A table with a row per row and k, a column per figure."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    seeds: dict[tuple[str, int], int] = {}
    for figure in table.figures:
        for line in _shown(study, table, lines, figure):
            key = line["row"], line["k"]
            cells.setdefault(key, {})[figure] = _cell(study, table, line)
            seeds[key] = max(line.get("seeds", 1), seeds.get(key, 1))
    order = list(study.rows if table.rows is None else table.rows)
    several = max(seeds.values(), default=1) > 1
    rows = []
    for row, k in sorted(cells, key=lambda key: (order.index(key[0]), key[1])):
        own = [cells[row, k].get(figure, "") for figure in table.figures]
        rows.append([row, str(k or "dense"), *([str(seeds[row, k])] if several else []), *own])
    heads = ["", "k", *(["seeds"] if several else []), *(study.figures[figure].title for figure in table.figures)]
    return [f"### {table.title}", markdown(heads, rows)]


def _cell(study: Study, table: Table, line: Line) -> str:
    show, share = _number(study, line), partial(_share, study, line)
    parts = {"value": show(line["value"]), "interval": between(line["interval"], show)}
    if line.get("seeds", 1) > 1:
        parts["range"] = between(line["range"], show)
    own = " ".join(parts[name] for name in table.show if name in parts)
    if "share" not in line:
        return own
    parts = {"share": f"{share(line['share'])} %", "share interval": between(line["share_interval"], share)}
    return ", ".join(filter(None, (own, " ".join(parts[name] for name in table.show if name in parts))))


def _places(study: Study, line: Line) -> int:
    own = study.figures[line["figure"]].decimals
    return decimals(line["items"]) if own is None else own


def _number(study: Study, line: Line) -> Any:
    scale, places = study.figures[line["figure"]].scale, _places(study, line)
    return lambda x: f"{scale * x:.{places}f}"


def _share(study: Study, line: Line, value: float) -> str:
    return f"{100 * value:.{_places(study, line)}f}"


def _cells(lines: list[Line], ks: list[int], show: Any) -> list[str]:
    """A cell for each of `ks`; where several have one value, it is that of the first token's vector, measured once."""
    cells = {line["k"]: show(line) for line in lines}
    if len(lines) > 1 and len({line["value"] for line in lines}) == 1:
        cells = {k: cell if k == min(cells) else "the same" for k, cell in cells.items()}
    return [cells.get(k, "") for k in ks]


def _claims(study: Study, found: dict[str, Any]) -> list[str]:
    """A table for each claim of several comparisons, a column per k; one table of those that are one comparison."""
    counts = {line["figure"]: line.get("items", 0) for line in found["figures"]}
    by_claim: dict[str, list[dict[str, Any]]] = {}
    for one in found["claims"]:
        by_claim.setdefault(one["claim"], []).append(one)
    single = [own[0] for own in by_claim.values() if len(own) == 1]
    parts = []
    if single:
        heads = ["claim", "figure", "ours", "against", "difference", "95 % interval", "p (Holm)", "verdict"]
        parts.append(markdown(heads, [_single(study, one, counts) for one in single]))
    for claim, own in by_claim.items():
        if len(own) == 1:
            continue
        ks, rows = sorted({one["k"] for one in own}), []
        for key in dict.fromkeys((one["figure"], one["ours"], one["against"]) for one in own):
            mine = [one for one in own if (one["figure"], one["ours"], one["against"]) == key]
            cells = _cells(mine, ks, partial(_difference, study, counts))
            rows.append([study.figures[key[0]].title, *key[1:], *cells])
        parts += [f"### {claim}", markdown(["figure", "ours", "against", *(f"k = {k}" for k in ks)], rows)]
    return parts


def _show(study: Study, one: dict[str, Any], counts: dict[str, int]) -> Any:
    if one["ratio"]:
        return "{:.2f}".format
    figure = study.figures[one["figure"]]
    places = figure.decimals if study.claim_decimals is None else study.claim_decimals
    places = decimals(counts[one["figure"]]) if places is None else places
    return lambda x: f"{figure.scale * x:+.{places}f}"


def _single(study: Study, one: dict[str, Any], counts: dict[str, int]) -> list[str]:
    show, margin = _show(study, one, counts), f", margin {100 * one['margin']:.1f}" if one["margin"] else ""
    sides = [f"{one[name]}, k = {one[at] or 'dense'}" for name, at in (("ours", "k"), ("against", "at"))]
    told = [show(one["value"]), between(one["interval"], show), f"{one['p_holm']:.3f}"]
    verdict = one["verdict"] if one["verdict"] == "open" else f"**{one['verdict']}**"
    return [one["claim"], study.figures[one["figure"]].title, *sides, *told, verdict + margin]


def _difference(study: Study, counts: dict[str, int], one: dict[str, Any]) -> str:
    show = _show(study, one, counts)
    text = f"{show(one['value'])} {between(one['interval'], show)}"
    text = text if one["verdict"] == "open" else f"**{text}**"
    return f"{text}, p {one['p_holm']:.3f}"


def report(study: Study, results: Path, module: Any = None) -> str:
    """Writes NAME.json, .md and .png; returns the page.

    Args:
        module: the study's, which may have `scores` in the place of `Scores`, and `extra`, which gives more sections.

    Raises:
        ValueError: there are no rows yet.
    """
    output = results / study.name
    rows = Rows(with_ending(output, ".rows.jsonl"))
    if not rows.cells:
        raise ValueError(f"There are no rows in {rows.file}: run the study first.")
    scores = getattr(module, "scores", Scores)(rows)
    found = summarise(study, scores)
    extra = module.extra(study, scores) if hasattr(module, "extra") else ""
    text = page(study, found, extra)
    write_json(with_ending(output, ".json"), found)
    write_text(with_ending(output, ".md"), text)
    drawn = picture(study, found["figures"]) if study.picture else None
    if drawn is not None:
        write_bytes(with_ending(output, ".png"), drawn)
    return text
