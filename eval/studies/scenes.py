"""Scenes: a generated benchmark that says how much a summary holds. Ground truth is exact; everything follows a seed.

    python -m eval.studies.scenes --output DIR --train 8000 --test 1000 --seed 0

A scene is a picture of 96 × 96 on a dark ground, of 3 × 3 places ("top left" … "bottom right") of 32 × 32. Each of its
1 to 9 objects has a place of its own, a shape (circle, square, triangle, cross, star, diamond), a colour (eight) and a
size (small: 12 across, large: 24), all drawn evenly and independently; the number of objects is even over the asked
range. Scene `i` of split `s` and seed `n` depends on (n, s, i) and nothing else.

Questions, each with one right answer: an attribute at a place ("what colour is the object at the top left?"), a count
("how many red objects are there?"), existence ("is there a small red circle?", as often yes as no, where no is off by
one attribute), a relation ("is the red circle left of the blue square?", as often yes as no).

Captions: long (every object, by place) and short (two objects and how they lie). For each short caption there are hard
negatives of SugarCrepe's seven kinds, each false of the picture: replace_obj (a shape), replace_att (a colour),
replace_rel (the relation), swap_obj (the two shapes), swap_att (the two colours), add_obj (an object that is not
there), add_att (a wrong size). And a hard negative picture: one object has another shape, colour, size or place,
so that the long caption is false of it.

Scenes of one object are 864, so that most of them are in every large split; of four objects there are 10¹⁰.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llava_fwd2bot.files.writing import write_folder, write_json

from .scene import COLOURS, OPPOSITE, PLACES, RELATIONS, SHAPES, SIZES, Scene, Statement, Thing, lies

FORMAT = 2  # of the files; 2 has the hard negative pictures
KINDS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


def make(seed: int, split: str, index: int, objects: tuple[int, int] = (1, 6)) -> Scene:
    """Scene `index` of a split; `objects`: the least and the most objects.

    Raises:
        ValueError: the range is not within 1 to 9.
    """
    if not 1 <= objects[0] <= objects[1] <= len(PLACES):
        raise ValueError(f"The number of objects must be from 1 to {len(PLACES)}, got {objects[0]} to {objects[1]}.")
    rng = random.Random(f"scene {seed} {split} {index}")
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(*objects)))
    return Scene(tuple(_thing(rng, place) for place in places))


def altered(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one object's shape, colour, size or place another: a picture that its long caption is false of."""
    at = rng.randrange(len(scene.things))
    thing, taken = scene.things[at], {other.place for other in scene.things}
    changes = {
        "shape": [s for s in SHAPES if s != thing.shape],
        "colour": [c for c in COLOURS if c != thing.colour],
        "size": [s for s in SIZES if s != thing.size],
        "place": [p for p in range(len(PLACES)) if p not in taken],
    }
    name = rng.choice([name for name, values in changes.items() if values])
    others = [*scene.things[:at], replace(thing, **{name: rng.choice(changes[name])}), *scene.things[at + 1 :]]
    return Scene(tuple(sorted(others, key=lambda other: other.place)))


def _thing(rng: random.Random, place: int | None = None) -> Thing:
    return Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), place)


def questions(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """One question of each kind that the scene allows: {"kind", "question", "answer"}."""
    found = []
    thing = rng.choice(scene.things)
    attribute = rng.choice(("colour", "shape", "size"))
    asked = f"what {attribute} is the object at the {PLACES[thing.place]}?"
    found.append({"kind": "attribute", "question": asked, "answer": getattr(thing, attribute)})
    name = rng.choice(("colour", "shape"))
    value = (
        getattr(rng.choice(scene.things), name)
        if rng.random() < 0.8
        else rng.choice(list(COLOURS if name == "colour" else SHAPES))
    )
    count = sum(getattr(other, name) == value for other in scene.things)
    asked = f"how many {value} objects are there?" if name == "colour" else f"how many {_plural(value)} are there?"
    found.append({"kind": "count", "question": asked, "answer": str(count)})
    said = replace(rng.choice(scene.things), place=None)
    if rng.random() < 0.5:
        said = _off_by_one(said, scene, rng)
    there = any(said.fits(other) for other in scene.things)
    found.append({"kind": "existence", "question": f"is there a {said}?", "answer": "yes" if there else "no"})
    statement = short(scene, rng)
    if statement is not None:
        turned = rng.random() < 0.5
        relation = OPPOSITE[statement.relation] if turned else statement.relation
        asked = f"is the {statement.first} {relation} the {statement.second}?"
        found.append({"kind": "relation", "question": asked, "answer": "no" if turned else "yes"})
    return found


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _off_by_one(said: Thing, scene: Scene, rng: random.Random) -> Thing:
    """`said` with one attribute changed, so that nothing in the scene is like it."""
    changes = [replace(said, shape=shape) for shape in SHAPES] + [replace(said, colour=colour) for colour in COLOURS]
    changes += [replace(said, size=size) for size in SIZES]
    false = [other for other in changes if not any(other.fits(thing) for thing in scene.things)]
    return rng.choice(false)


def short(scene: Scene, rng: random.Random) -> Statement | None:
    """Two objects that colour and shape tell from all others, and a relation that holds and whose opposite does not."""
    plain = [Thing(thing.shape, thing.colour) for thing in scene.things]
    unique = [i for i, said in enumerate(plain) if plain.count(said) == 1]
    choices = []
    for i in unique:
        for j in unique:
            for relation in RELATIONS:
                a, b = scene.things[i], scene.things[j]
                if i != j and lies(a, relation, b) and not lies(a, OPPOSITE[relation], b):
                    choices.append(Statement(plain[i], relation, plain[j]))
    return rng.choice(choices) if choices else None


def negatives(statement: Statement, scene: Scene, rng: random.Random) -> dict[str, str]:
    """A false caption of each kind that can be made false of this scene: {kind: caption}."""
    first, second = statement.first, statement.second
    there = next(thing for thing in scene.things if first.fits(thing))
    wrong = next(size for size in SIZES if size != there.size)
    options = {
        "replace_obj": [replace(statement, first=replace(first, shape=shape)) for shape in SHAPES],
        "replace_att": [replace(statement, first=replace(first, colour=colour)) for colour in COLOURS],
        "replace_rel": [replace(statement, relation=OPPOSITE[statement.relation])],
        "swap_obj": [
            replace(statement, first=replace(first, shape=second.shape), second=replace(second, shape=first.shape))
        ],
        "swap_att": [
            replace(statement, first=replace(first, colour=second.colour), second=replace(second, colour=first.colour))
        ],
        "add_obj": [replace(statement, more=Thing(s, c)) for s in SHAPES for c in COLOURS],
        "add_att": [replace(statement, first=replace(first, size=wrong))],
    }
    false = {kind: [o for o in options[kind] if not o.true_of(scene)] for kind in KINDS}
    return {kind: str(rng.choice(found)) for kind, found in false.items() if found}


def items(seed: int, split: str, count: int, objects: tuple[int, int] = (1, 6)) -> Iterator[dict[str, Any]]:
    """All that there is to a split, scene by scene: image name, scene, long and short caption, questions, negatives,
    and the scene of the hard negative picture."""
    for index in range(count):
        scene = make(seed, split, index, objects)
        rng = random.Random(f"text {seed} {split} {index}")
        asked, statement = questions(scene, rng), short(scene, rng)
        yield {
            "image": f"{split}-{index:06d}.png",
            "scene": scene,
            "objects": len(scene.things),
            "caption": scene.caption(),
            "short": None if statement is None else str(statement),
            "questions": asked,
            "negatives": {} if statement is None else negatives(statement, scene, rng),
            "altered": altered(scene, rng),
        }


def write(output: Path, seed: int, splits: dict[str, int], objects: tuple[int, int] = (1, 6)) -> Path:
    """Writes `output`: images/, and of each split SPLIT.json (LLaVA's conversations), SPLIT.questions.jsonl (with kind,
    objects and answer), SPLIT.captions.jsonl, SPLIT.sugarcrepe/KIND.json, and of each but train a hard negative
    picture per image (named `altered` in SPLIT.captions.jsonl).

    Raises:
        FileExistsError: `output` is there; nothing is touched.
    """
    if output.exists():
        raise FileExistsError(17, "The folder exists: choose another --output", str(output))
    with write_folder(output) as beside:
        (beside / "images").mkdir()
        for split, count in splits.items():
            _write_split(beside, seed, split, count, objects)
        about = {
            "seed": seed,
            "splits": splits,
            "objects": list(objects),
            "format": FORMAT,
            "described_in": "eval/studies/scenes.py",
        }
        write_json(beside / "about.json", about)
    return output


def _write_split(folder: Path, seed: int, split: str, count: int, objects: tuple[int, int]) -> None:
    records, asked, captions = [], [], []
    hard: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for item in tqdm(items(seed, split, count, objects), total=count, desc=split, unit="scene"):
        item["scene"].draw().save(folder / "images" / item["image"])
        said = [text for text in (item["short"], item["caption"]) if text]
        for n, q in enumerate(
            [{"kind": "describe", "question": "describe the picture.", "answer": item["caption"]}, *item["questions"]]
        ):
            name = f"{item['image'][:-4]}-{n}"
            turns = [{"from": "human", "value": f"<image>\n{q['question']}"}, {"from": "gpt", "value": q["answer"]}]
            records.append({"id": name, "image": item["image"], "conversations": turns, "caption": said})
            line = {"question_id": name, "image": item["image"], "text": q["question"], "answer": q["answer"]}
            asked.append({**line, "kind": q["kind"], "objects": item["objects"]})
        captions.append({"image": item["image"], "captions": said})
        if split != "train":
            captions[-1]["altered"] = f"{item['image'][:-4]}-altered.png"
            item["altered"].draw().save(folder / "images" / captions[-1]["altered"])
        for kind, text in item["negatives"].items():
            entry = {"filename": item["image"], "caption": item["short"], "negative_caption": text}
            hard[kind][str(len(hard[kind]))] = entry
    (folder / f"{split}.json").write_text(json.dumps(records) + "\n")
    for name, lines in (("questions", asked), ("captions", captions)):
        (folder / f"{split}.{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{split}.sugarcrepe").mkdir()
    for kind, entries in hard.items():
        (folder / f"{split}.sugarcrepe" / f"{kind}.json").write_text(json.dumps(entries) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objects", type=int, nargs=2, default=(1, 6), metavar=("LEAST", "MOST"))
    args = parser.parse_args()
    print(write(args.output, args.seed, {"train": args.train, "test": args.test}, tuple(args.objects)))


if __name__ == "__main__":
    main()
