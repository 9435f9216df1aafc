"""The tables of the study of quantised models, in Markdown."""

from __future__ import annotations

from typing import Any

from llava_fwd2bot.evaluation.resample import bootstrap
from llava_fwd2bot.evaluation.tables import markdown

from .quantised_models import FLOAT

TITLES = {"exists": "yes/no", "caption": "CIDEr", "retrieval": "text→image R@1", "sugarcrepe": "SugarCrepe"}
TASKS = tuple(TITLES)
IMAGES = 8  # compressed at once, where that is timed
TOKENS = 32  # of an answer that is timed


def cell(parts: dict[str, Any], task: str, first: str, second: str) -> str:
    own, base = parts.get(f"{task} {first} → {second}"), parts.get(f"{task} {FLOAT} → {FLOAT}")
    if own is None or base is None:
        return ""
    value = f"{100 * own['value']:.1f}"
    if own is base or not base["value"]:  # of 0 there is no share
        return value
    drawn = bootstrap(own["items"], base["items"], groups=own["groups"])
    share, low, high = (f"{100 * x:.1f}" for x in (own["value"] / base["value"], *drawn))
    return f"{value}: {share} % [{low}, {high}]"


def table(found: dict[str, Any]) -> str:
    parts, rows = found["parts"], []
    pairs = list(dict.fromkeys(tuple(name.split(" ", 1)[1].split(" → ")) for name in parts))
    known = set(found.get("memory", ()))
    heads = ["compressed by", "answered or searched by", *(TITLES[t] for t in TASKS)]
    heads += ["MB, model", "MB, layers", "answer, tokens/s", "compress, images/s"]
    for first, second in pairs:
        cells = [first, second, *(cell(parts, task, first, second) for task in TASKS)]
        if first == second and first in known:
            cells += [f"{found['memory'][first][part] / 1e6:.0f}" for part in ("model", "layers")]
            seconds = found.get("seconds", {})
            for kind, count in (("answer", TOKENS), ("compress", IMAGES)):
                timed = seconds.get(f"{kind} {first}")
                cells.append("" if timed is None else f"{count / timed['median']:.1f}")
        else:
            cells += [""] * 4
        rows.append(cells)
    return markdown(heads, rows)


def document(found: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    parts, here = found["parts"], found.get("environment", {})
    counts = {t: len(parts[f"{t} {FLOAT} → {FLOAT}"]["items"]) for t in TASKS if f"{t} {FLOAT} → {FLOAT}" in parts}
    lines = [
        "# smol-llava quantised",
        "",
        f"Items: {', '.join(f'{TITLES[t]} {n}' for t, n in counts.items())}. After the colon: the share of {FLOAT}'s "
        "figure and its 95 % interval, by paired bootstrap over images. For R@1 and SugarCrepe the first column "
        "compresses the images, the second the texts. Quantised are the linear layers of the language model; `MB, "
        "layers` are its blocks alone, adapters included, `MB, model` is all, embeddings and vision tower in float, "
        "counted after an answer: when bitsandbytes first computes on a CPU, it unpacks doubly quantised scales.",
        "",
        table(found),
        "",
    ]
    if here:
        lines += [
            f"Speed: median of rounds in which all models ran in turn, {here['threads']} thread(s) of "
            f"{here['device']}, one answer of {TOKENS} tokens, {IMAGES} images. torch {here['torch']}, bitsandbytes "
            f"{here['bitsandbytes']}, torchao {here['torchao']}, {here['date'][:10]}.",
            "",
        ]
    lines += [
        "## LLaVA-1.5-7B, counted",
        "",
        "Bytes of the shape with both stages' adapters, not measured: bfloat16, and NF4 with double quantisation of "
        "the language model's linear layers, with the vision tower's as well where it says so.",
        "",
    ]
    sizes = [
        [str(row["lora_r"] or "none"), "yes" if row["tower"] else "no"]
        + [f"{row[name] / 1e9:.2f}" for name in ("bfloat16", "nf4")]
        + [f"{row['ratio']:.3f}"]
        for row in found["shapes"]
    ]
    lines.append(markdown(["LoRA rank", "tower in 4 bits", "GB, bfloat16", "GB, NF4", "ratio"], sizes))
    return "\n".join(lines) + "\n"
