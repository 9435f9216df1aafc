"""The training files of smol-llava, out of Flickr8k's captions and DAQUAR's questions.

    python scripts/smol_data.py --data DATA --output DIR

DATA holds `flickr8k/{train.jsonl,images}` and `daquar/{train.jsonl,images}`. DIR gets stage1.json (captions), stage2.json (the mix of
instructions), captions.jsonl (for the contrastive loss), images/ (links), and tune.json: what is kept out of training
to choose settings by. What results are reported on (Flickr8k's dev, 100 images of DAQUAR) is in none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from llava_fwd2bot.config import write_json
from llava_fwd2bot.smol import instructions as make

TUNING = 300  # Flickr8k's training images kept out
DAQUAR_REPORTED, DAQUAR_TUNING = 100, 40


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def daquar_splits(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions to report on, to tune by, and to train on; no image is in two of them."""
    reported, tuning, training = make.split_by_image(
        read_lines(data / "daquar" / "train.jsonl"), (DAQUAR_REPORTED, DAQUAR_TUNING)
    )
    return reported, tuning, training


def in_folder(entries: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    return [{**entry, "image": f"{folder}/{entry['image']}"} for entry in entries]


def write_training_files(data: Path, output: Path, seed: int = 0) -> dict[str, int]:
    """Writes the files that the module names; gives their numbers of records."""
    flickr = in_folder(read_lines(data / "flickr8k" / "train.jsonl"), "flickr8k/images")
    random.Random(seed).shuffle(flickr)
    tuning, training = flickr[:TUNING], flickr[TUNING:]
    _, daquar_tuning, daquar = (in_folder(part, "daquar/images") for part in daquar_splits(data))
    output.mkdir(parents=True, exist_ok=True)
    stage2 = make.caption_records(training, 2, seed) + make.question_records(daquar, 3, seed)
    random.Random(seed).shuffle(stage2)
    files: dict[str, Any] = {
        "stage1.json": make.describe_records(training, 2, seed),
        "stage2.json": stage2,
        "captions.json": [{"image": e["image"], "captions": [make.tidy(c) for c in e["captions"]]} for e in training],
        "tune.json": {"captions": tuning, "questions": daquar_tuning},
    }
    for name, content in files.items():
        write_json(output / name, content)
    return {name: len(content) for name, content in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, count in write_training_files(arguments.data, arguments.output, arguments.seed).items():
        print(f"{arguments.output / name}: {count:,} records")


if __name__ == "__main__":
    main()
