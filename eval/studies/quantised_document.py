"""The tables of the study of quantised models, in Markdown."""

from __future__ import annotations

from typing import Any

from llava_fwd2bot.evaluation.resample import bootstrap

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
    low, high = bootstrap(own["items"], base["items"], groups=own["groups"])
    return f"{value}: {100 * own['value'] / base['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def table(found: dict[str, Any]) -> str:
    parts, rows = found["parts"], []
    pairs = list(dict.fromkeys(tuple(name.split(" ", 1)[1].split(" → ")) for name in parts))
    known = set(found.get("memory", ()))
    rows.append("| compressed by | answered or searched by | " + " | ".join(TITLES[t] for t in TASKS))
    rows[0] += " | MB, model | MB, layers | answer, tokens/s | compress, images/s |"
    rows.append("|---" * (len(TASKS) + 6) + "|")
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
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


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
        "| LoRA rank | tower in 4 bits | GB, bfloat16 | GB, NF4 | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in found["shapes"]:
        sizes = " | ".join(f"{row[name] / 1e9:.2f}" for name in ("bfloat16", "nf4"))
        lines.append(
            f"| {row['lora_r'] or 'none'} | {'yes' if row['tower'] else 'no'} | {sizes} | {row['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"
