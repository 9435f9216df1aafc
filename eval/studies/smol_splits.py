"""Splits of the photographs: training of smol-llava, choice of its settings, and reported results; they are disjoint.

    python -m eval.studies.smol_splits --data DATA --output DIR

DATA holds `flickr8k/{train,dev}.jsonl` and `daquar/train.jsonl` with their `images`. Files written to DIR:

stage1.json     captions, for LLaVA's first stage
stage2.json     the mix of instructions, for its second stage and for Fwd2Bot
stage2b.json    the same with all captions, for the longer part of the second stage
captions.json   for the contrastive loss
tune.json       captions and questions held out for choosing settings

Reported results use Flickr8k's dev split and 100 of DAQUAR's images, which are in none of these files.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.smol import instructions as make

FLICKR_TUNING = 300
DAQUAR_REPORTED, DAQUAR_TUNING = 100, 40


def daquar(data: Path) -> list[list[dict[str, Any]]]:
    """Questions for reporting, for tuning, and for training."""
    return make.split_by_image(read_records(data / "daquar" / "train.jsonl"), (DAQUAR_REPORTED, DAQUAR_TUNING))


def flickr(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Captioned images for tuning and for training."""
    entries = read_records(data / "flickr8k" / "train.jsonl")
    random.Random(0).shuffle(entries)
    return entries[:FLICKR_TUNING], entries[FLICKR_TUNING:]


def write_training_files(data: Path, output: Path) -> dict[str, int]:
    """Writes the files listed above, with image paths relative to DATA; returns their numbers of records."""

    def within(entries: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
        return [{**entry, "image": f"{folder}/images/{entry['image']}"} for entry in entries]

    tuning, training = (within(part, "flickr8k") for part in flickr(data))
    _, asked_tuning, asked = (within(part, "daquar") for part in daquar(data))
    stage2 = make.caption_records(training, 2, 0) + make.question_records(asked, 3, 0)
    random.Random(0).shuffle(stage2)
    more = make.describe_records(training, 5, 1) + make.caption_records(training, 1, 1, questions=3)
    more += make.question_records(asked, 3, 1)
    random.Random(1).shuffle(more)
    files: dict[str, Any] = {
        "stage1.json": make.describe_records(training, 2, 0),
        "stage2.json": stage2,
        "stage2b.json": more,
        "captions.json": [{"image": e["image"], "captions": [make.tidy(c) for c in e["captions"]]} for e in training],
        "tune.json": {"captions": tuning, "questions": asked_tuning},
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_json(output / name, content)
    return {name: len(content) for name, content in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    for name, count in write_training_files(arguments.data, arguments.output).items():
        print(f"{arguments.output / name}: {count:,} records")


if __name__ == "__main__":
    main()
