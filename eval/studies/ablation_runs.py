"""All runs of an ablation study in one file, by which it goes on elsewhere: it may take longer than a machine is free.

OUTPUT.base is the base that they are of, as training it elsewhere gives another in the last digits. OUTPUT.runs.json:

    {"base": a hash of the base's weights, "questions": what is the same in all results, "runs": {ROW: {SEED: result}}}

A result is result.json of the run, with its lists of zeros and ones as texts, "0110…", and attention in five digits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_fwd2bot.evaluation.results import with_ending
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_folder, write_json, write_text

from .ablation import folder_of
from .ablation_study import BASE, Study

SHARED = ("kinds", "objects", "images")  # of the questions


def weights_of(base: Path) -> str:
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


def gather(study: Study, work: Path, output: Path) -> None:
    """Adds the results of `work` to OUTPUT.runs.json, and their base beside it; what is there already stays.

    Raises:
        ValueError: what is there is of another base, or a result of other questions.
    """
    files = {(name, seed): folder_of(work, name, seed) / "result.json" for name, seed in study.runs()}
    files = {row: file for row, file in files.items() if file.exists()}
    if not files:
        return
    target = with_ending(output, ".runs.json")
    content = read_json(target) if target.exists() else {"base": weights_of(work / BASE), "questions": {}, "runs": {}}
    _same_base(content, target, work)
    questions = content["questions"]
    for (name, seed), file in files.items():
        result = read_json(file)
        mine = {key: result["answers"].pop(key) for key in SHARED}
        mine |= {"hard": result.pop("hard_images")} if "hard_images" in result else {}
        if any(questions.get(key, value) != value for key, value in mine.items()):
            raise ValueError(f"{file} is of other questions than the results in {target}: remove {file.parent}.")
        questions |= mine
        if "attention" in result:
            result["attention"] = [float(f"{x:.5g}") for x in result["attention"]]
        packed = _items(result, lambda items: "".join(str(int(x)) for x in items))
        content["runs"].setdefault(name, {})[str(seed)] = packed
    _copy_base(work / BASE, with_ending(output, ".base"))
    write_text(target, json.dumps(content, separators=(",", ":")) + "\n")


def scatter(study: Study, output: Path, work: Path) -> None:
    """Lays what `gather` wrote, if it did, into `work`, where it is missing.

    Those of other settings than the study's are left where they are, until a new one takes their place.

    Raises:
        ValueError: they are of another base than that of `work`.
    """
    file = with_ending(output, ".runs.json")
    if not file.exists():
        return
    content = read_json(file)
    if not (work / BASE).exists():
        _copy_base(with_ending(output, ".base"), work / BASE)
    _same_base(content, file, work)
    for name, seeds in content["runs"].items():
        row = study.rows.get(name)
        for seed, packed in seeds.items():
            target = folder_of(work, name, int(seed)) / "result.json"
            fits = name == BASE or row and packed["settings"] == study.settings(row) and packed["k"] == row.k
            if target.exists() or not fits:
                continue
            result = _items(packed, lambda text: [float(x) for x in text])
            result["answers"] |= {key: content["questions"][key] for key in SHARED}
            if "hard" in result:
                result["hard_images"] = content["questions"]["hard"]
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, result)


def _same_base(content: dict[str, Any], file: Path, work: Path) -> None:
    if content["base"] != weights_of(work / BASE):
        raise ValueError(
            f"{file} holds runs on another base than {work / BASE}, which cannot be averaged: choose another --work or "
            "--output."
        )


def _copy_base(source: Path, target: Path) -> None:
    """Beside, then renamed; a base that is there already and has the same weights stays."""
    if target.exists() and weights_of(target) == weights_of(source):
        return
    with write_folder(target) as half:
        shutil.copytree(source, half, dirs_exist_ok=True)


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
