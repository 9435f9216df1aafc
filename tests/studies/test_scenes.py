"""Scenes: what is said of a picture is true of its pixels, what should be false is false, a seed is a benchmark."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from eval.studies import scenes
from eval.studies.scene import GROUND
from llava_fwd2bot.evaluation.compositionality import read_items
from llava_fwd2bot.evaluation.datasets import read_captioned

MANY = list(scenes.items(0, "test", 400, (1, 9)))
WORDS = rf"(small |large )?({'|'.join(scenes.COLOURS)})? ?({'|'.join(scenes.SHAPES)})"


def thing_in(text: str) -> scenes.Thing:
    size, colour, shape = re.fullmatch(WORDS, text).groups()
    return scenes.Thing(shape, colour, size and size.strip())


def true_by_text(caption: str, scene: scenes.Scene) -> bool:
    """A second reading of a short caption, out of its words."""
    said, _, more = caption.partition(" and a ")
    first, relation, second = re.fullmatch(rf"a (.+) ({'|'.join(scenes.RELATIONS)}) a (.+)", said).groups()
    across = {"left of": 0, "right of": 0, "above": 1, "below": 1}[relation]
    sign = {"left of": -1, "above": -1}.get(relation, 1)
    for a in scene.things:
        for b in scene.things:
            at, to = divmod(a.place, 3)[::-1], divmod(b.place, 3)[::-1]
            if thing_in(first).fits(a) and thing_in(second).fits(b) and sign * (at[across] - to[across]) > 0:
                return not more or any(thing_in(more).fits(c) for c in scene.things)
    return False


def test_pixels_show_what_the_scene_says():
    """Colour at each object's centre, ground at empty places, and a large object covers more than a small one."""
    area = {}
    for item in MANY[:200]:
        pixels = np.asarray(item["scene"].draw())
        taken = {thing.place: thing for thing in item["scene"].things}
        for place in range(9):
            cell = pixels[32 * (place // 3) :, 32 * (place % 3) :][:32, :32]
            shown = (cell != GROUND).any(-1)
            if place not in taken:
                assert not shown.any()
                continue
            thing = taken[place]
            assert (cell[shown] == scenes.COLOURS[thing.colour]).all() and shown[16, 16]
            area.setdefault((thing.shape, thing.size), set()).add(int(shown.sum()))
    assert all(len(found) == 1 for found in area.values()) and len(area) == 12
    assert all(min(area[s, "large"]) > 2 * max(area[s, "small"]) for s in scenes.SHAPES)
    drawn = {
        tuple(np.asarray(scenes.Scene((scenes.Thing(s, "red", "large", 4),)).draw()).ravel()) for s in scenes.SHAPES
    }
    assert len(drawn) == 6  # no two shapes look alike


def test_captions_are_true_and_negatives_false():
    """By a second reading, out of the words; a negative that is true would score a right model as wrong."""
    kinds = Counter()
    for item in MANY:
        if item["short"] is None:
            continue
        assert true_by_text(item["short"], item["scene"])
        for kind, text in item["negatives"].items():
            kinds[kind] += 1
            assert text != item["short"] and not true_by_text(text, item["scene"]), (kind, text)
    assert set(kinds) == set(scenes.KINDS) and min(kinds.values()) > 100


def test_questions_have_the_right_answer():
    yes = Counter()
    for item in MANY:
        things = item["scene"].things
        for q in item["questions"]:
            text, answer = q["question"], q["answer"]
            if q["kind"] == "attribute":
                attribute, place = re.fullmatch(r"what (\w+) is the object at the (.+)\?", text).groups()
                thing = next(t for t in things if scenes.PLACES[t.place] == place)
                assert answer == getattr(thing, attribute)
            elif q["kind"] == "count":
                word = text.split()[2].removesuffix("s").removesuffix("se" if "crosses" in text else "")
                word = "cross" if "crosses" in text else word
                assert answer == str(sum(word in (t.shape, t.colour) for t in things))
            elif q["kind"] == "existence":
                said = thing_in(re.fullmatch(r"is there a (.+)\?", text)[1])
                assert answer == ("yes" if any(said.fits(t) for t in things) else "no")
                yes[answer] += 1
            else:
                first, relation, second = re.fullmatch(
                    rf"is the (.+) ({'|'.join(scenes.RELATIONS)}) the (.+)\?", text
                ).groups()
                assert answer == ("yes" if true_by_text(f"a {first} {relation} a {second}", item["scene"]) else "no")
                yes[answer] += 1
    assert abs(yes["yes"] - yes["no"]) < 0.1 * sum(yes.values())  # saying yes every time earns a half


def test_a_hard_negative_picture_differs_in_one_object():
    """So that its caption is another: one that differed in nothing would be as right as the picture itself."""
    changed = Counter()
    for item in MANY:
        mine, other = item["scene"], item["altered"]
        assert mine.caption() != other.caption() and len(mine.things) == len(other.things)
        assert [t.place for t in other.things] == sorted(t.place for t in other.things)
        (one,), (two,) = (set(a.things) - set(b.things) for a, b in ((mine, other), (other, mine)))
        (name,) = [n for n in ("shape", "colour", "size", "place") if getattr(one, n) != getattr(two, n)]
        changed[name] += 1
    assert min(changed.values()) > 60


def test_a_seed_is_a_benchmark():
    """The same on every machine and for every count; other seeds and splits are others."""
    assert [item["caption"] for item in scenes.items(0, "test", 5)] == [
        i["caption"] for i in scenes.items(0, "test", 9)
    ][:5]
    assert scenes.make(0, "test", 3) != scenes.make(1, "test", 3) != scenes.make(0, "train", 3)
    assert (
        scenes.make(0, "test", 0, (2, 2)).caption()
        == "a small yellow cross at the top right, a small red circle at the middle center"
    )
    counts = Counter(item["objects"] for item in MANY)
    assert set(counts) == set(range(1, 10)) and max(counts.values()) < 3 * min(counts.values())
    with pytest.raises(ValueError, match="from 1 to 9, got 0 to 3"):
        scenes.make(0, "test", 0, (0, 3))


def test_what_is_written_is_read_by_the_evaluators(tmp_path):
    folder = scenes.write(tmp_path / "scenes", 0, {"train": 4, "test": 3}, (2, 4))
    records = json.loads((folder / "train.json").read_text())
    assert all((folder / "images" / record["image"]).is_file() and record["caption"] for record in records)
    assert len(read_captioned(str(folder / "test.captions.jsonl"))) == 3
    said = [json.loads(line) for line in (folder / "test.captions.jsonl").read_text().splitlines()]
    assert all((folder / "images" / line["altered"]).is_file() for line in said)
    found = read_items(folder / "test.sugarcrepe", folder / "images")
    assert found.kind == "sugarcrepe" and {item.kind for item in found.items} <= set(scenes.KINDS)
    lines = [json.loads(line) for line in (folder / "test.questions.jsonl").read_text().splitlines()]
    assert {"question_id", "image", "text", "answer", "kind", "objects"} <= set(lines[0])
    with pytest.raises(FileExistsError):
        scenes.write(folder, 1, {"test": 1})
    assert json.loads((folder / "about.json").read_text())["seed"] == 0 and len(list(tmp_path.iterdir())) == 1
    assert random.Random("scene 0 test 0").random() == random.Random("scene 0 test 0").random()
