"""All runs of an ablation study in one file, by which it goes on elsewhere: it may take longer than a machine is free.

OUTPUT.base is the base that they are of, as training it elsewhere gives another in the last digits. OUTPUT.runs.json:

    {"base": a hash of the base's weights, "questions": what is the same in all results, "runs": {ROW: {SEED: result}}}

A result is result.json of the run, with its lists of zeros and ones as texts, "0110…".
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_fwd2bot.config import read_json, write_json, write_text

from .ablation import BASE, Study, folder_of
from .results import beside

SHARED = ("kinds", "objects", "images")  # of the questions


def weights_of(base: Path) -> str:
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


def gather(study: Study, work: Path, output: Path) -> None:
    """Writes all results of `work` into OUTPUT.runs.json, and their base beside it."""
    runs: dict[str, dict[str, Any]] = {}
    questions: dict[str, Any] = {}
    for name, seeds in ((BASE, [0]), *((name, study.seeds) for name in study.rows)):
        for seed in seeds:
            file = folder_of(work, name, seed) / "result.json"
            if not file.exists():
                continue
            result = read_json(file)
            mine = {key: result["answers"].pop(key) for key in SHARED}
            mine |= {"hard": result.pop("hard_images")} if "hard_images" in result else {}
            if any(questions.get(key, value) != value for key, value in mine.items()):
                raise ValueError(f"{file} is of other questions than the results before it: remove it.")
            questions |= mine
            if "attention" in result:
                result["attention"] = [float(f"{x:.5g}") for x in result["attention"]]
            runs.setdefault(name, {})[str(seed)] = _items(result, lambda items: "".join(str(int(x)) for x in items))
    content = {"base": weights_of(work / BASE), "questions": questions, "runs": runs}
    write_text(beside(output, ".runs.json"), json.dumps(content, separators=(",", ":")) + "\n")
    if not beside(output, ".base").exists():
        shutil.copytree(work / BASE, beside(output, ".base"))


def scatter(output: Path, work: Path) -> int:
    """Lays what `gather` wrote, if it did, into `work`, where it is missing; gives how many results.

    Raises:
        ValueError: they are of another base than that of `work`.
    """
    file, laid = beside(output, ".runs.json"), 0
    if not file.exists():
        return 0
    if not (work / BASE).exists():
        shutil.copytree(beside(output, ".base"), work / BASE)
    content = read_json(file)
    if content["base"] != weights_of(work / BASE):
        raise ValueError(
            f"{file} holds runs on another base than {work / BASE}, which cannot be averaged: "
            "choose another --work or --output."
        )
    for name, seeds in content["runs"].items():
        for seed, packed in seeds.items():
            target = folder_of(work, name, int(seed)) / "result.json"
            if target.exists():
                continue
            result = _items(packed, lambda text: [float(x) for x in text])
            result["answers"] |= {key: content["questions"][key] for key in SHARED}
            if "hard" in result:
                result["hard_images"] = content["questions"]["hard"]
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, result)
            laid += 1
    return laid


def _items(result: dict[str, Any], turn: Callable[[Any], Any]) -> dict[str, Any]:
    """The result with all its lists of zeros and ones turned."""
    result = copy.deepcopy(result)
    parts = [
        result["answers"]["k"],
        result.get("t2i", {}),
        result.get("t2i_hard", {}),
        *result.get("hard", {}).values(),
    ]
    for part in parts:
        part.update({name: turn(items) for name, items in part.items()})
    return result
