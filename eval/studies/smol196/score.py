"""From the answers of a run on the device, token numbers, to rows of the study.

    python -m eval.studies.smol196.score --folder DIR [--results eval/results]

DIR holds truth.json and rows.npz of prepare.py, and `runs` as they came back from the device. The tokenizer is needed
here alone.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import metrics
from eval.studies.rows import Cell, Rows
from eval.studies.smol196.pictures import SIDE
from eval.studies.smol196.recipes import BLIND, PRUNED
from eval.studies.smol196.tasks import TASKS, Item
from llava_fwd2bot.smol import build

RESULTS = Path(__file__).parents[2] / "results"
Decode = Callable[[np.ndarray], list[str]]


def decoder(vocabulary: Sequence[int], tokenizer: Any, end: int) -> Decode:
    """Rows of the study's token numbers → texts, up to the end mark."""
    numbers = np.asarray(vocabulary)

    def decode(rows: np.ndarray) -> list[str]:
        texts = []
        for row in rows:
            stops = np.flatnonzero(row == end)
            texts.append(numbers[row[: stops[0]] if len(stops) else row].tolist())
        return [text.strip() for text in tokenizer.batch_decode(texts, skip_special_tokens=True)]

    return decode


def letters(said: str, truth: str) -> float:
    """Share of the letters that were read: 1 − edit distance over the longer text's length, at least 0."""
    a, b = (re.sub(r"[^a-z ]", "", text.lower()) for text in (said, truth))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return max(0.0, 1 - row[-1] / max(len(a), len(b), 1))


def score(items: Sequence[Item], variants: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Of each task one number per variant and question: CIDEr, letters, or right and wrong, [variants, questions]

    Captions of all variants are scored at once: each brings the same references, which changes nothing but the time.
    """
    found = {}
    for task in TASKS:
        at = [i for i, item in enumerate(items) if item.task == task]
        if not at:
            continue
        said = [answers[i] for answers in variants for i in at]
        truth = [items[i].truth for i in at] * len(variants)
        first = [own[0] for own in truth]
        if task in ("caption", "at"):
            scores = metrics.caption_scores(said, truth)["per_image"]
        elif task == "words":
            scores = [letters(text, right) for text, right in zip(said, first, strict=True)]
        elif task in ("exists", "any"):
            scores = metrics.yes_no(said, first)["per_item"]
        else:
            scores = metrics.exact(said, first)
        found[task] = np.asarray(scores).reshape(len(variants), -1)
    return found


def write_rows(folder: Path, rows: Rows, decode: Decode) -> None:
    """Adds the rows of every run in `folder`/runs that has none yet.

    A run's arrays are its answers at k as `k4`, with another image as `wrong` and to pruned tokens as `prune4`, and the
    ranks of captions by vectors of j tokens as `t2i4`.
    """
    known = json.loads((folder / "truth.json").read_text())["items"]
    items = [Item(i["task"], i["question"], i["truth"]) for i in known]
    done = {(cell.row, cell.seed) for cell in rows.cells.values()}
    answered = [] if (BLIND, 0) in done else [(BLIND, 0, 0, {}, [i["blind"] for i in known])]  # row, k, seed, …
    for file in sorted((folder / "runs").glob("*/result.json")):
        result = json.loads(file.read_text())
        name, seed, about = result["recipe"]["name"], result["recipe"]["seed"], {"recipe": result["recipe"]}
        if (name, seed) in done:
            continue
        for part, cells in result.pop("scalars", {}).items():
            for k, values in cells.items():  # of each task, or one
                rows.add_task(part, list(values))
                rows.add(Cell(part, name, int(k), seed, list(values.values()), result))
        with np.load(file.parent / "answers.npz", allow_pickle=False) as stored:
            for variant in stored.files:
                kind, k = re.fullmatch(r"(k|wrong|prune|t2i)(\d*)", variant).groups()
                if kind == "t2i":
                    rows.add_task(kind, [i // 5 for i in range(len(stored[variant]))])
                    rows.add(Cell(kind, name, int(k), seed, (stored[variant] < 1).astype(int), about))
                else:
                    row = {"k": name, "wrong": f"{name}, wrong image", "prune": PRUNED}[kind]
                    answered.append((row, int(k or 0), seed, about, decode(stored[variant])))
    if not answered:
        return
    for task, scores in score(items, [answers for *_, answers in answered]).items():
        rows.add_task(task, [i["picture"] for i in known if i["task"] == task])
        for (row, k, seed, about, _), own in zip(answered, scores, strict=True):
            rows.add(Cell(task, row, k, seed, own, about))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args(argv)
    vocabulary = json.loads((a.folder / "truth.json").read_text())["vocabulary"]
    with np.load(a.folder / "rows.npz", allow_pickle=False) as stored:
        end = int(stored["end"][0])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build._processor(build.published_file(build.LANGUAGE_MODEL, Path(folder)), SIDE).tokenizer
    write_rows(a.folder, Rows(a.results / "smol196.rows.jsonl"), decoder(vocabulary, tokenizer, end))


if __name__ == "__main__":
    main()
