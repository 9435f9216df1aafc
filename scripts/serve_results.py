"""eval/results/serve.json, a section of which each of the server's scripts writes, and serve.md, which shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_fwd2bot.files.writing import write_text

RESULTS = Path(__file__).resolve().parents[1] / "eval/results/serve.json"


def keep(section: str, figures: dict[str, Any], path: Path = RESULTS) -> None:
    """Puts the figures in the place of the section's earlier ones, and writes the page anew."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[section] = figures
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(path.with_suffix(".md"), page(found))


def page(found: dict[str, Any]) -> str:
    parts = ["# The server, measured\n\nEvery figure is in `serve.json`; the command that made it stands with it.\n"]
    parts += [render(found[name]) for name, render in SECTIONS.items() if name in found]
    return "\n".join(parts)


def _load(f: dict[str, Any]) -> str:
    text = f"""## Many at once

`{f["command"]}`

Asks about {f["images"]} images of a cache, {f["model"]} in {f["dtype"]}, {f["threads"]} threads
({f["environment"]["device"]}), batches of {f["batch_size"]}. In each round a share of the distinct asks went one at a
time, then all asks at once, to one server. The goal was 3 times as many answers in the same time. Other programs ran on
the machine, more or less of them from minute to minute; so the seconds of the processors per answer are given as well.

"""
    heads = ["answers end", "tokens", "asks", "one at a time, asks/s", "at once, asks/s", "ratio"]
    heads += ["one at a time, processor s", "at once, processor s", "ratio", "p50, s", "p95, s"]
    text += f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    for name, load in f["loads"].items():
        for r in load["rounds"]:
            cells = [name, f"{load['mean_tokens']:.1f}", load["asks"], f"{r['alone_per_second']:.2f}"]
            cells += [f"{r['together_per_second']:.2f}", f"{r['ratio']:.2f}", f"{r['alone_processor_seconds']:.2f}"]
            cells += [f"{r['together_processor_seconds']:.2f}", f"**{r['processor_ratio']:.2f}**"]
            text += f"| {' | '.join(map(str, cells))} | {r['p50']:.1f} | {r['p95']:.1f} |\n"
    sent, lost, wrong = (sum(load[key] for load in f["loads"].values()) for key in ("sent", "lost", "wrong"))
    text += f"\nLost: {lost} of {sent}. Other than alone: {wrong} of {sent}.\n\n"
    return text + WHY


WHY = """By the work of the processors the goal is reached for answers of 32 tokens, and not for the short answers that
smol-llava gives by itself. A batch reads the weights once for the next token of all its rows; but the prompts (about 35
tokens here) are arithmetic that a batch does not save, and on two cores they are most of the work of an answer of five
tokens. Prompts that begin with the same image could share that part; the server does not do so.
"""


def _fuzz(f: dict[str, Any]) -> str:
    mb = [round(value / 2**20) for value in f["resident"]]
    return f"""## Random requests and damaged pictures

`{f["command"]}`

Schemathesis {f["schemathesis"]}: {f["cases"]:,} requests made from the OpenAPI description; status 5xx:
{f["server_errors"]}; other findings: {f["findings"] or "none"}. {f["pictures"]} damaged pictures: {f["pictures_5xx"]}
answered with 5xx, {f["pictures_read"]} could be read for all that, the others were refused with 400. Memory of the
process in MB, from the first request to the last: {", ".join(map(str, mb))}.
"""


def _kill(f: dict[str, Any]) -> str:
    return f"""## Killed at work

`{f["command"]}`

{f["kills"]} times `kill -9` while it answered and added images: {f["verified"]} times the cache verified,
{f["healthy"]} times `/health` was right with the first request after the restart. Images that were confirmed:
{f["confirmed"]}, of which lost: {f["lost"]}; half there: {f["half"]}; of those that were not confirmed
{f["unconfirmed_there"]} were there, whole. Answers that were given before the kills: {f["answers"]}. From start to the
first request: {f["seconds_to_start"]:.1f} s (median).
"""


SECTIONS = {"load": _load, "fuzz": _fuzz, "kill": _kill}
