"""`fwd2bot eval report`: Fwd2Bot against its base, per benchmark and k, with intervals and published figures."""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files.writing import write_bytes, write_json, write_text
from . import resample
from .drawing import panels, plain, png, powers
from .resample import bootstrap, sign_flips
from .results import DENSE, Result, pair, published_of, read_results, with_ending
from .tables import between, decimals, markdown, percent


def compare(results: Sequence[Result], base: str | None = None) -> list[dict[str, Any]]:
    """A row per result, with its retention: its share of the base's score on the same benchmark.

    Args:
        base: the model that is the base; default: the one with results from dense tokens.

    Returns:
        Rows with benchmark, model, k, value and its 95 % interval, items (their number), retention and its paired
        interval (bootstrap over items), and p of a paired two-sided permutation test (sign flips, 10,000 draws).

    Raises:
        ValueError: there are two bases, none has the given name, or the base has other items.
    """
    if base is not None and base not in {result.model for result in results}:
        models = ", ".join(sorted({result.model for result in results}))
        raise ValueError(f"--base {base!r} has no result. The models are: {models}.")
    rows = []
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        bases = [r for r in own if base in (None, r.model) and r.k == DENSE]
        if base is not None and not bases:  # a base that answers from summaries itself
            bases = [r for r in own if r.model == base]
        by_limit: dict[int | None, Result] = {}
        for result in bases:
            if (other := by_limit.setdefault(result.limit, result)) is not result:
                raise ValueError(f"{name} has several bases: {other.source}, {result.source}. Choose one with --base.")
        only_base = bases[0] if len(bases) == 1 else None  # a base of another --limit is an error, not skipped
        for result in sorted(own, key=lambda r: (not any(r is base for base in bases), r.model, -_tokens(r.k))):
            reference = by_limit.get(result.limit, only_base)
            row: dict[str, Any] = {"benchmark": name, "model": result.model, "k": result.k, "value": result.value}
            row |= {"base": result is reference, "limit": result.limit, "source": str(result.source)}
            row["items"] = len(result.items)
            if result.scale is not None:
                drawn = bootstrap(list(result.items.values()), groups=result.groups)
                row["interval"] = [result.scale * x for x in drawn]
            elif result.counts is not None:
                row["interval"] = list(resample.interval(result.counts))
            if reference is not None and result is not reference and reference.value:
                ours, theirs = pair(result, reference)
                row["retention"] = result.value / reference.value
                if result.scale is not None and reference.scale is not None:
                    row["retention_interval"] = list(bootstrap(ours, theirs, groups=reference.groups))
                    row["p"] = sign_flips(ours, theirs, reference.groups)
                elif result.counts is not None and reference.counts is not None:
                    row["retention_interval"] = list(resample.interval(result.counts, reference.counts))
            rows.append(row)
    return rows


def _tokens(k: int | str) -> float:
    return float("inf") if k == DENSE else float(k)


INTRO = (
    "n: number of items. Intervals: 95 %, by bootstrap over items, all items of an image drawn together. Retention: "
    "the score as a share of the base's on the same items. p: the chance of a difference this large if there were none."
)
COLUMNS = ["model", "k", "n", "score", "95 % interval", "retention", "95 % interval", "p"]


Block = tuple[str, Any]  # an HTML tag and its text; of a table its lines of cells, the titles first


def blocks(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """The report's content: a table per benchmark, with what others published on it."""
    found: list[Block] = [("h1", "Evaluation report"), ("p", f"{date.today()}. {INTRO}")]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        own = [row for row in rows if row["benchmark"] == name]
        found += [("h2", name), ("table", [COLUMNS, *map(_cells, own)])]
        others, source = published_of(name)
        if others and not any(row["limit"] for row in own):
            published = [f"{m} {_published(x)}" + (f" ({tokens} tokens)" if tokens else "") for m, tokens, x in others]
            found.append(("p", f"Published by others: {'; '.join(published)}. Source: {source}."))
    return found


def report_markdown(rows: Sequence[dict[str, Any]]) -> str:
    heads = {"h1": "# ", "h2": "## ", "p": ""}
    parts = [markdown(x[0], x[1:]) if tag == "table" else heads[tag] + x for tag, x in blocks(rows)]
    return "\n\n".join(parts) + "\n"


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}"
    "img{max-width:100%}p{color:#555}"
)


def page(rows: Sequence[dict[str, Any]], png: bytes | None) -> str:
    """The report and its picture as one HTML file that needs nothing else."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c).replace('**', '')}</{tag}>" for c in cells) + "</tr>"

    parts = []
    for tag, x in blocks(rows):
        inner = line(x[0], "th") + "".join(line(c, "td") for c in x[1:]) if tag == "table" else html.escape(x)
        parts.append(f"<{tag}>{inner}</{tag}>")
    if png is not None:
        picture = base64.b64encode(png).decode()
        parts.insert(2, f'<img alt="retention" src="data:image/png;base64,{picture}">')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation report</title>'
    body = "\n".join(parts)
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def _cells(row: dict[str, Any]) -> list[str]:
    name = f"**{row['model']}** (base)" if row["base"] else row["model"]
    name += f", first {row['limit']} items" if row["limit"] else ""
    score = partial(_score, whole=row["value"], count=row["items"])
    cells = [name, str(row["k"]), f"{row['items']:,}", score(row["value"]), _interval(row.get("interval"), score)]
    if "retention" in row:
        share = partial(percent, count=row["items"])
        cells += [f"{share(row['retention'])} %", _interval(row.get("retention_interval"), share)]
    else:
        cells += ["", ""]
    return [*cells, f"{row['p']:.4f}" if "p" in row else ""]


def _score(value: float, whole: float, count: int) -> str:
    """A figure or a bound of its interval: points, a percentage, or a share in [0, 1], by the size of the figure."""
    if abs(whole) >= 1000:
        return f"{value:.1f}"
    return f"{value:.{decimals(count) + (0 if abs(whole) > 2 else 2)}f}"


def _published(value: float) -> str:
    return f"{value:.1f}" if abs(value) > 2 else f"{value:.3f}"


def _interval(values: Sequence[float] | None, show: Callable[[float], str]) -> str:
    return "" if values is None else between(values, show)


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of retention over tokens, one panel per benchmark, with published retention in grey."""
    names = [
        n
        for n in dict.fromkeys(r["benchmark"] for r in rows)
        if any("retention" in r for r in rows if r["benchmark"] == n)
    ]
    if not names:
        raise ValueError("Nothing to draw: no benchmark has both a base and another result.")
    figure, axes = panels(len(names), (4.4, 3.4))
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["benchmark"] == name and "retention" in row and row["k"] != DENSE]
        for model in dict.fromkeys(row["model"] for row in own):
            line = sorted((row for row in own if row["model"] == model), key=lambda row: row["k"])
            values = [100 * row["retention"] for row in line]
            spread = [row.get("retention_interval") or [row["retention"]] * 2 for row in line]
            bars = [[v - 100 * s[0] for v, s in zip(values, spread, strict=True)]]
            bars.append([100 * s[1] - v for v, s in zip(values, spread, strict=True)])
            ks = [row["k"] for row in line]
            axis.errorbar(ks, values, yerr=np.abs(bars), marker="o", markersize=4, capsize=2, label=Path(model).name)
        others = [] if any(row["limit"] for row in own) else published_of(name)[0]
        others = [row for row in others if row[1]]  # retrieval's have no base
        for method in dict.fromkeys(row[0] for row in others[1:]):
            line = sorted(row[1:] for row in others[1:] if row[0] == method)
            shares = [100 * value / others[0][2] for _, value in line]
            axis.plot([tokens for tokens, _ in line], shares, color="0.7", marker=".", linewidth=1)
            axis.annotate(method, (line[-1][0], shares[-1]), fontsize=6, color="0.5")
        axis.axhline(100, color="black", linestyle="--", linewidth=1)
        powers(axis, [1, 2, 4, 8, 16, 32])
        axis.set(title=name, xlabel="tokens per image", ylabel="retention, %")
        axis.title.set_fontsize(9)
        plain(axis)
        if own:
            axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return png(figure)


def report(paths: Sequence[Path], output: Path | None, base: str | None = None) -> str:
    """The Markdown; with `output`, also OUTPUT.json, .md and .html, and .png if a result has its base's beside it.

    Files of another kind in a folder are named on stderr. Errors as of `read_results` and `compare`.
    """
    found = read_results(paths)
    if found.skipped:
        shown = ", ".join(map(str, found.skipped[:5])) + (" …" if len(found.skipped) > 5 else "")
        print(f"fwd2bot: skipped {len(found.skipped)} file(s) without results: {shown}", file=sys.stderr)
    rows = compare(found.results, base)
    text = report_markdown(rows)
    if output is not None:
        png = picture(rows) if any("retention" in row for row in rows) else None
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(with_ending(output, ".json"), {"date": str(date.today()), "rows": rows})
        write_text(with_ending(output, ".md"), text)
        write_text(with_ending(output, ".html"), page(rows, png))
        if png is not None:
            write_bytes(with_ending(output, ".png"), png)
    return text
