"""Which recipe a specification names, where earlier runs decide, and whose it is to do it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

from eval.studies.smol196.recipes import LINEAR, Recipe, recipe

QUICK = 150  # runs of fewer steps choose settings: they are measured on the tuning split alone


def claim(lock: Path) -> bool:
    """Whether this process may do it; a lock whose process is gone is taken over."""
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        owner = lock.read_text()
        if not owner or Path(f"/proc/{owner}").exists():
            return False
    lock.write_text(str(os.getpid()))
    return True


def best_rate(runs: Path, chosen: Recipe) -> float:
    """The rate of the quick run with the least tuning loss: of this recipe, else of its kind, else the recipe's own.

    All that train an answer adapter alone, on what no language model made, are of pooling's kind.
    """
    name, kind = chosen.name.split("_")[0], _kind(chosen.kind)
    tried: dict[str, dict[float, float]] = {name: {}, kind: {}}
    for file in sorted(runs.glob("*/result.json")):
        result = json.loads(file.read_text())
        settings = result["recipe"]
        if 0 < settings["steps"] < QUICK and _kind(settings["kind"]) == kind:
            losses = [loss for of_k in result.get("tuning", {}).values() for loss in of_k.values()] or [math.inf]
            for key in {settings["name"].split("_")[0], kind} & tried.keys():
                tried[key].setdefault(settings["rate"], sum(losses) / len(losses))
    found = tried[name] or tried[kind]
    return min(found, key=found.get) if found else chosen.rate


def _kind(kind: str) -> str:
    return "pool" if kind in (*LINEAR, "downsample") else kind


def winner(runs: Path) -> str:
    """Of the quick runs of Fwd2Bot for both ends, without a residual, the one with the least tuning loss.

    Raises:
        ValueError: there is none.
    """
    losses = {}
    for file in sorted(runs.glob("*/result.json")):
        result = json.loads(file.read_text())
        settings = result["recipe"]
        if 0 < settings["steps"] < QUICK and settings["kind"] == "fwd2bot":
            if settings["contrastive"] and not settings["residual"]:
                found = [loss for of_k in result["tuning"].values() for loss in of_k.values()]
                losses[settings["name"].split("_")[0]] = sum(found) / len(found)
    if not losses:
        raise ValueError(f"{runs} has no quick run that `winner` could be chosen from")
    return min(losses, key=losses.get)


def choose(runs: Path, spec: str) -> Recipe:
    """A recipe by its spec, with what only earlier runs can tell filled in."""
    if spec.split(":")[0] == "winner":
        spec = winner(runs) + spec.removeprefix("winner")
    chosen = recipe(spec.replace("rate=auto,", "").replace("rate=auto", ""))
    return replace(chosen, rate=best_rate(runs, chosen)) if "rate=auto" in spec else chosen
