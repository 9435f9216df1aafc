"""The table of gpu_all.py: times beside what the device can do at most."""

from __future__ import annotations

from typing import Any

HEADER = ("what", "batch", "side", "time", "over the base", "TFLOP/s (of peak)", "GB/s (of peak)", "peak memory")


def markdown(report: dict[str, Any]) -> str:
    """What gpu_all.py found so far, as Markdown: a head, and one table."""
    parts = report["parts"]
    results = {name: part["result"] for name, part in parts.items() if "result" in part}
    peak = results.get("device", {})
    rows: list[list[str]] = []
    if peak:
        memory = _gib(peak["memory_bytes"]) if "memory_bytes" in peak else ""
        what = f"peak: {peak['matrix']}³ bfloat16 product; copy of {peak['copy_mib']} MiB"
        rows.append([what, "", "device", "", "", f"{peak['tflops']:.3g}", f"{peak['gb_per_s']:.4g}", memory])
    if "train" in results:
        rows += _train(results["train"], peak)
    if "infer" in results:
        rows += _infer(results["infer"], peak)
    if "tests" in parts:
        rows += _tests(parts["tests"])
    for name, part in parts.items():
        rows += [[f"{name}: {part['state']}", "", part["why"], *[""] * 5]] if "why" in part else []
        left_out = part.get("result", {}).get("left_out", [])
        rows += [[f"{name}: left out", "", why, *[""] * 5] for why in left_out]
    rows += [[f"not here: {name}", "", what, *[""] * 5] for name, what in report["missing"].items()]
    lines = [*_head(report, results), "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


def _head(report: dict[str, Any], results: dict[str, Any]) -> list[str]:
    about = next((found["environment"] for found in results.values() if "environment" in found), {})
    device = about.get("device", report["device"])
    versions = ", ".join(f"{n} {about[n]}" for n in ("torch", "transformers", "peft", "python") if n in about)
    shapes = {found["shape"] for name, found in results.items() if name != "device"}
    took = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in report["parts"].items() if "seconds" in part)
    return [
        f"Measured {report['date'][:10]} on {device}; {versions}. Command: `{report['command']}` ({took}).",
        "",
        f"Random weights of the shape {', '.join(sorted(shapes)) or '-'}, bfloat16. Medians, with quartiles of ratios "
        "taken round by round. TFLOP/s count the products of layers, head and tower (recomputed ones too, LoRA not); "
        "GB/s count weights, adapters and kept keys and values, not activations: the least that must move.",
    ]


def _train(result: dict[str, Any], peak: dict[str, Any]) -> list[list[str]]:
    rows = []
    for batch, found in result["by_batch"].items():
        what = "training step" + ", gradient checkpointing" * found["gradient_checkpointing"]
        for side, times in found["times"].items():
            over = found["step_time_ratios"].get(side)
            memory = found["memory"][side]
            rows.append(
                [
                    what,
                    batch,
                    {"host": "host's LoRA", "fwd2bot": f"Fwd2Bot, k = {result['k']}"}.get(side, side),
                    _ms(1000 * times["median"]),
                    _over(over),
                    *_achieved(found["achieved"][side], peak),
                    f"{_gib(memory['peak'])} (step {_gib(memory['peak'] - memory['before'])})",
                ]
            )
    return rows


def _infer(result: dict[str, Any], peak: dict[str, Any]) -> list[list[str]]:
    rows = []
    names = {"base": "base from the image", "image": "Fwd2Bot from the image", "cached": "Fwd2Bot from the summary"}
    names["words"] = "base on as many words"
    for batch, found in result["by_batch"].items():
        for what, times, achieved in (
            ("first token", found["ttft_ms"], found["achieved_first"]),
            ("each later token", found["ms_per_token"], found["achieved_later"]),
        ):
            for side, time in times.items():
                kind, _, k = side.partition(", ")
                over = ""
                if side != "base" and "base" in times:
                    over = f"{time['median'] / times['base']['median']:.3g}"
                memory = found.get("memory", {}).get(side)
                told = "" if memory is None or what == "first token" else _gib(memory["peak"])
                label = names[kind] + (f", {k}" if k else "")
                rows.append([what, batch, label, _ms(time["median"]), over, *_achieved(achieved[side], peak), told])
    for k, batches in result.get("compress", {}).items():
        for batch, found in batches.items():
            memory = _gib(found["memory"]["peak"]) if "memory" in found else ""
            side = f"{found['images_per_second']:.4g} images/s, k = {k}"
            time = _ms(found["ms_per_image"]["median"]) + " an image"
            rows.append(["compress", batch, side, time, "", *_achieved(found["achieved"], peak), memory])
    return rows


def _tests(part: dict[str, Any]) -> list[list[str]]:
    tests = part.get("tests", {})
    counts = {state: list(tests.values()).count(state) for state in ("PASSED", "FAILED", "ERROR", "SKIPPED", "ENDED")}
    told = ", ".join(f"{count} {state.lower()}" for state, count in counts.items() if count) or "none ran"
    rows = [["tests (`pytest -m gpu`)", "", told, *[""] * 5]]
    for name, state in tests.items():
        if state in ("FAILED", "ERROR", "ENDED"):
            why = part.get("failed", {}).get(name, "")
            rows.append(
                [f"test {state.lower()}", "", f"{name.partition('::')[2]}: {why}"[:300].rstrip(": "), *[""] * 5]
            )
    rows += [["test skipped", "", why, *[""] * 5] for why in dict.fromkeys(part.get("skipped", []))]
    for fact in part.get("facts", []):
        if not isinstance(fact["value"], list):  # lists are in the JSON
            value = fact["value"]
            if isinstance(value, dict):
                value = ", ".join(f"{n} {v}" for n, v in value.items())
            rows.append([fact["fact"], "", str(value), *[""] * 5])
    return rows


def _achieved(found: dict[str, float], peak: dict[str, Any]) -> list[str]:
    cells = []
    for name in ("tflops", "gb_per_s"):
        share = f" ({found[name] / peak[name]:.0%})" if peak else ""
        cells.append(f"{found[name]:.3g}{share}")
    return cells


def _over(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['ratio']:.3f} [{ratio['lower_quartile']:.3f}, {ratio['upper_quartile']:.3f}]"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
