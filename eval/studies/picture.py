"""The picture of a study: figures against k as lines, or of every row as bars.

In a study's YAML, `picture: {figures: […], grey: […], rows: […], bars: true}`: rows in `grey` are not an equal
comparison and dotted; `rows` instead of all; `bars` where most rows have one k. `bytes: {ROW: …, others: …}` is the
size of a token and adds panels against the bytes of an image.
"""

from __future__ import annotations

from typing import Any

from llava_fwd2bot.evaluation.drawing import panels, plain, png, powers, pyplot

from .study import Study

Line = dict[str, Any]


def picture(study: Study, lines: list[Line]) -> bytes | None:
    """A PNG with a panel for each figure; None while nothing of it was measured."""
    about = study.picture
    names = about.get("rows") or [name for name in study.rows if name != study.base]
    shown = [f for f in about["figures"] if any(line["figure"] == f and line["row"] in names for line in lines)]
    if not shown:
        return None
    draw = _bars if about.get("bars") else _lines
    return png(draw(study, lines, names, shown))


def _scaled(study: Study, line: Line) -> tuple[float, float, float]:
    """The figure as it is shown, and how far its interval reaches below and above."""
    scale = study.figures[line["figure"]].scale
    value, (low, high) = scale * line["value"], (scale * x for x in line["interval"])
    # where all items are equal, rounding can put the value outside its interval
    return value, max(0.0, value - low), max(0.0, high - value)


def _lines(study: Study, lines: list[Line], names: list[str], figures: list[str]) -> Any:
    sizes = study.picture.get("bytes")
    against = [(name, size) for name in figures for size in ([None, sizes] if sizes else [None])]
    figure, axes = panels(len(against), (4.8, 3.8) if len(against) > 1 else (8, 5))
    names = [name for name in names if any(x["row"] == name and x["figure"] in figures and x["k"] for x in lines)]
    palette, grey = pyplot().get_cmap("tab10").colors, study.picture.get("grey", [])
    for axis, (name, size) in zip(axes, against, strict=True):
        for line in (x for x in lines if x["figure"] == name and x["row"] == study.base and not x["k"]):
            value = study.figures[name].scale * line["value"]
            axis.axhline(value, color="black", linestyle="--", linewidth=1, label=f"{study.base}, dense")
        for i, row in enumerate(names):
            mine = [x for x in lines if x["figure"] == name and x["row"] == row and x["k"]]
            style: dict[str, Any] = {"color": palette[i % 10], "marker": "os^Dv"[i % 5]}
            if row in grey:
                style |= {"color": "0.6", "linestyle": ":", "markerfacecolor": "white"}
            elif i >= 10:  # the colours repeat
                style |= {"linestyle": "--", "markerfacecolor": "white"}
            if mine:
                values, *errors = zip(*(_scaled(study, x) for x in mine), strict=True)
                each = 1 if size is None else size.get(row, size["others"]) / 1024
                at = [x["k"] * each * 1.015 ** (i - len(names) / 2) for x in mine]  # so that intervals do not overlap
                axis.errorbar(at, values, yerr=errors, markersize=4, elinewidth=0.6, label=row, **style)
        ks = sorted({x["k"] for x in lines if x["figure"] == name and x["row"] in names and x["k"]})
        powers(axis, ks if size is None else _kib(max(ks) * max(size.values())))
        axis.set(title=study.figures[name].title, xlabel="tokens per image" if size is None else "KiB per image")
        plain(axis)
    found = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=5, frameon=False, fontsize=8)
    if grey:
        note = f"{', '.join(grey)}: trained for longer, not an equal comparison"
        figure.text(0.5, 0.995, note, ha="center", va="top")
    below = 0.2 + 0.2 * -(-len(found) // 5)  # inches of the legend
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 0.97 if grey else 1))
    return figure


def _kib(most: float) -> list[int]:
    """Powers of two up to `most` bytes."""
    return [2**i for i in range(int(most / 1024).bit_length())]


def _bars(study: Study, lines: list[Line], names: list[str], figures: list[str]) -> Any:
    keys = list(dict.fromkeys((x["row"], x["k"]) for name in names for x in lines if x["row"] == name))
    figure, axes = pyplot().subplots(1, len(figures), figsize=(5 * len(figures), 0.3 * len(keys) + 1.6), squeeze=False)
    grey = study.picture.get("grey", [])
    for axis, name in zip(axes[0], figures, strict=True):
        own = {(x["row"], x["k"]): _scaled(study, x) for x in lines if x["figure"] == name}
        for place, key in enumerate(keys):
            if key in own:
                value, low, high = own[key]
                colour = "0.7" if key[0] in grey else "#4878a8"
                axis.barh(place, value, xerr=[[low], [high]], color=colour, height=0.7, error_kw={"linewidth": 1})
        if (study.base, 0) in own:
            axis.axvline(own[study.base, 0][0], color="black", linestyle="--", linewidth=1)
        labels = [row if row == f"k {k}" else f"{row}, k = {k}" for row, k in keys]
        axis.set_yticks(range(len(keys)), labels if axis is axes[0][0] else [""] * len(keys), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(study.figures[name].title, fontsize=10)
        plain(axis)
    if grey:
        axes[0][0].set_xlabel("grey: trained for longer, not an equal comparison", fontsize=8)
    figure.tight_layout()
    return figure
