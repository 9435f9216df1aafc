"""How a checkpoint is used: ten questions about one image in one conversation, and many images in one prompt.

    python -m eval.studies.use --data DATA --output eval/results/use.json [--model smol-llava]

Images and captions are those of Flickr8k's dev split, in DATA. `turns`: the questions are asked in one conversation,
with the model's own answers before them, and each alone. `images`: whether an object is in one of 1 to 50 images. Sides
are the base, on dense tokens, and the first k summary tokens. Answers are yes or no; any other answer is wrong. OUTPUT
is written after each part, and a part that is in it is not done again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.evaluation.resample import bounds, drawn, numbers
from llava_fwd2bot.evaluation.tables import markdown, ranged
from llava_fwd2bot.files.images import open_image
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_json, write_text
from llava_fwd2bot.processing.answer import answers_to
from llava_fwd2bot.processing.conversation import PLACEHOLDER, ConversationFormatter
from llava_fwd2bot.processing.generate import summaries_of
from llava_fwd2bot.processing.normal import normal
from llava_fwd2bot.smol import instructions as make

TURNS, COUNTS, BATCH = 10, (1, 2, 5, 10, 20, 50), 10
Objects = tuple[list[str], list[str]]  # surely in an image, and surely absent


@dataclass
class Asked:
    """A question, and what was said: `group` is the image, or the prompt, whose answers are drawn together."""

    part: str
    side: str
    at: int  # the turn, or the number of images
    group: int
    right: str
    said: str | None


class Side:
    """Answers by the base (k None), or from the first k summary tokens of each image, of `summary` [M, K, D]."""

    def __init__(self, model: Any, processor: Any, k: int | None, images: Sequence[Any], summary: Tensor) -> None:
        self.model, self.processor, self.k, self.images, self.summary = model, processor, k, images, summary
        self.name = "base" if k is None else f"k = {k}"
        self.formatter = ConversationFormatter(processor)

    def __call__(self, talks: Sequence[list[dict[str, str]]], about: Sequence[list[int]]) -> list[str]:
        """One answer to each conversation about the images of these numbers."""
        prompts, base = [self.formatter.ask(talk) for talk in talks], self.k is None
        rows = [[self.images[i] for i in own] if base else self.summary[own, : self.k] for own in about]
        return answers_to(self.model, self.processor, prompts, rows, base, None, {"max_new_tokens": 3})


def yes_or_no(text: str) -> str | None:
    """What an answer says first; None where it is neither."""
    first = normal(text).split()[:1]
    return first[0] if first in (["yes"], ["no"]) else None


def question(text: str, images: int = 1) -> dict[str, str]:
    return {"from": "human", "value": f"{PLACEHOLDER}\n" * images + text}


def questions_of(captions: Sequence[str], chance: random.Random) -> list[tuple[str, str]] | None:
    """TURNS questions about an image, at most half of them with the answer yes, in random order; None where too few."""
    there, absent = make.objects_in(captions)
    there = chance.sample(there, min(len(there), TURNS // 2))
    if not there or len(absent) < TURNS - len(there):
        return None
    asked = [(name, "yes") for name in there] + [(name, "no") for name in chance.sample(absent, TURNS - len(there))]
    chance.shuffle(asked)
    return [(make.existence_question(name), right) for name, right in asked]


def turns(side: Side, asked: Sequence[list[tuple[str, str]]]) -> Iterator[Asked]:
    """Each image's questions in one conversation, and each alone."""
    for start in tqdm(range(0, len(asked), BATCH), desc=f"turns, {side.name}", unit="batch"):
        part = range(start, min(start + BATCH, len(asked)))
        talks: list[list[dict[str, str]]] = [[] for _ in part]
        for turn in range(TURNS):
            for i, talk in zip(part, talks, strict=True):
                talk.append(question(asked[i][turn][0], 0 if turn else 1))
            alone = [[question(asked[i][turn][0])] for i in part]
            for name, given in (("turns", talks), ("alone", alone)):
                said = side(given, [[i] for i in part])
                yield from (
                    Asked(name, side.name, turn + 1, i, asked[i][turn][1], yes_or_no(text))
                    for i, text in zip(part, said, strict=True)
                )
                if given is talks:
                    for talk, text in zip(talks, said, strict=True):
                        talk.append({"from": "gpt", "value": text})


def sets_of(known: Sequence[Objects], count: int, prompts: int, chance: random.Random) -> Iterator[tuple]:
    """(numbers of `count` images, object, yes or no): one image shows the object, or none does, by turns."""
    names = [
        name
        for name in make.OBJECTS
        if any(name in there for there, _ in known) and sum(name in absent for _, absent in known) >= count
    ]
    if not names:
        raise ValueError(f"{len(known)} images are too few for prompts of {count}: raise --images, or lower --most.")
    for number in range(prompts):
        name, right = chance.choice(names), "no" if number % 2 else "yes"
        without = [i for i, (_, absent) in enumerate(known) if name in absent]
        chosen = chance.sample(without, count)
        if right == "yes":
            chosen[chance.randrange(count)] = chance.choice([i for i, (there, _) in enumerate(known) if name in there])
        yield chosen, name, right


def many_images(side: Side, known: Sequence[Objects], prompts: int, most: int) -> Iterator[Asked]:
    """Whether an object is in one of several images, for each number of images up to `most`."""
    for count in (n for n in COUNTS if n <= most):
        sets = list(sets_of(known, count, prompts, random.Random(count)))
        for number, (chosen, name, right) in enumerate(tqdm(sets, desc=f"{count} images, {side.name}", unit="prompt")):
            text = make.existence_question(name).replace("the image", "the images" if count > 1 else "the image")
            said = side([[question(text, count)]], [chosen])
            yield Asked("images", side.name, count, number, right, yes_or_no(said[0]))


# ---------------------------------------------------------------------- what is shown
def balanced(rows: Sequence[dict[str, Any]]) -> tuple[float, tuple[float, float]]:
    """Mean of the shares that are right among yes and among no, in percent, and its interval by drawing groups."""
    columns = []  # right and all, of yes and of no
    for answer in ("yes", "no"):
        asked = [row["right"] == answer for row in rows]
        columns += [[own and row["said"] == answer for own, row in zip(asked, rows, strict=True)], asked]
    group = numbers([row["group"] for row in rows])
    sums = np.stack([np.bincount(group, weights=column) for column in columns], 1)  # [G, 4]

    def figure(total: np.ndarray) -> np.ndarray:
        return 50 * (total[..., 0] / total[..., 1] + total[..., 2] / total[..., 3])

    with np.errstate(invalid="ignore"):
        found = figure(drawn(sums))
    return float(figure(sums.sum(0))), bounds(found[np.isfinite(found)])


def report(result: dict[str, Any]) -> str:
    """The page of results."""
    sides = list(dict.fromkeys(row["side"] for row in result["rows"]))

    def table(part: str, first: str, places: Sequence[tuple[str, Sequence[int]]]) -> str:
        lines = []
        for title, at in places:
            cells = [
                [r for r in result["rows"] if (r["part"], r["side"]) == (part, s) and r["at"] in at] for s in sides
            ]
            both = [len({row["right"] for row in rows}) == 2 for rows in cells]
            lines.append(
                [title, *(ranged(*balanced(rows)) if ok else "" for rows, ok in zip(cells, both, strict=True))]
            )
        return markdown([first, *sides], lines)

    spans = [("1", [1]), ("2 to 4", [2, 3, 4]), ("5 to 7", [5, 6, 7]), ("8 to 10", [8, 9, 10])]
    counts = [(str(n), [n]) for n in COUNTS if any((r["part"], r["at"]) == ("images", n) for r in result["rows"])]
    return "\n".join(
        [
            "# Many questions about one image, many images in one prompt\n",
            f"{result['model']}, {result['images']} photographs of Flickr8k's dev split, {result['date']}:",
            f"`{result['command']}`.",
            "Balanced accuracy of yes/no questions about objects, in percent; 50 is chance. In brackets 95 %",
            "intervals, by drawing images, or prompts, anew.\n",
            "## Ten questions in one conversation\n",
            "The model's own answers stand before each question.\n",
            table("turns", "question", spans),
            "\nThe same questions, each alone:\n",
            table("alone", "question", [("all", range(1, TURNS + 1))]),
            "\n## Is it in one of the images?\n",
            table("images", "images", counts),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--model", default="smol-llava")
    options.add_argument("--output", type=Path, required=True, help="a .json; the page stands beside it")
    options.add_argument("--k", type=int, nargs="+", default=[16, 4])
    options.add_argument("--images", type=int, default=100, help="of the conversations")
    options.add_argument("--prompts", type=int, default=100, help="for each number of images")
    options.add_argument("--most", type=int, default=max(COUNTS), help="images in a prompt")
    args = options.parse_args(argv)

    model, processor = load_fwd2bot(args.model, dtype=torch.float32)
    chance, folder = random.Random(0), args.data / "flickr8k"
    entries = [(e, questions_of(e["captions"], chance)) for e in read_records(folder / "dev.jsonl")]
    entries = [(entry, asked) for entry, asked in entries if asked][: args.images]
    images = [open_image(folder / "images" / entry["image"]) for entry, _ in entries]
    with torch.inference_mode():
        batches = [summaries_of(model, processor, images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    summary = torch.cat(batches)  # [M, K, D]
    sizes = f"--k {' '.join(map(str, args.k))} --images {len(images)} --prompts {args.prompts} --most {args.most}"
    command = f"python -m eval.studies.use --data DATA --model {args.model} {sizes}"
    result = {"model": args.model, "images": len(images), "date": str(date.today()), "command": command, "rows": []}
    if args.output.exists() and (kept := read_json(args.output))["command"] == command:
        result = kept
    known = [make.objects_in(entry["captions"]) for entry, _ in entries]
    for side in (Side(model, processor, k, images, summary) for k in (None, *args.k)):
        for part in ("turns", "images"):
            if any((row["part"], row["side"]) == (part, side.name) for row in result["rows"]):
                continue
            if part == "turns":
                found = turns(side, [asked for _, asked in entries])
            else:
                found = many_images(side, known, args.prompts, args.most)
            result["rows"] += [vars(row) for row in found]
            write_json(args.output, result)
    write_text(args.output.with_suffix(".md"), report(result))


if __name__ == "__main__":
    main()
