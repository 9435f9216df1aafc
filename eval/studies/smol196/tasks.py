"""What is asked of the pictures, with answers from human captions and questions; training, tuning and report apart.

task      picture                       question, answer, score
caption   a Flickr8k photograph         describe it: CIDEr
exists    the same                      is there X in it: balanced for each object
at        a collage                     describe the picture at a place: CIDEr against that photograph's captions
any       a collage                     is there X in it: balanced for each object
where     a collage                     where is the picture with X (exactly one shows it): nine places
count     a collage                     how many pictures show X: 0 to 4, drawn evenly
words     words printed on a photograph read them from the top: share of letters
daquar    an indoor photograph          human questions: exact

No photograph is in two of the splits, whole or as part of a collage. Flickr8k's dev split and COCO are reported alone.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.studies.smol196.pictures import Picture, collage, printed, single
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.smol import instructions as make

from .. import smol_splits

TASKS = ("caption", "exists", "at", "any", "where", "count", "words", "daquar")
READ = "Read the words from top to bottom."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass
class Item:
    """One question. `truth`: the answers that count as right; captions are several."""

    task: str
    question: str
    truth: list[str]


@dataclass
class Entry:
    """A picture, what is asked of it, and its captions where it is one photograph."""

    picture: Picture
    items: list[Item] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """How many pictures of each kind a split has; None is all there are."""

    singles: int | None
    collages: int
    words: int
    daquar: int | None


SIZES = {
    "train": Sizes(None, 13000, 3500, 250),
    "tune": Sizes(None, 250, 150, 0),
    "report": Sizes(None, 800, 300, 80),
}


@dataclass
class Photos:
    """Captioned photographs of one split: what each shows, and what it leaves no room for."""

    captions: dict[str, list[str]]

    def __post_init__(self) -> None:
        self.there: dict[str, set[str]] = {}
        self.absent: dict[str, set[str]] = {}
        self.showing, self.lacking = defaultdict(list), defaultdict(list)
        for name, said in self.captions.items():
            there, absent = make.objects_in(said)
            self.there[name], self.absent[name] = set(there), set(absent)
            for thing in there:
                self.showing[thing].append(name)
            for thing in absent:
                self.lacking[thing].append(name)
        self.themes = [t for t in make.OBJECTS if len(self.showing[t]) >= 4 and len(self.lacking[t]) >= 6]


def photographs(data: Path, split: str) -> tuple[Photos, Photos, list[dict[str, Any]]]:
    """Flickr8k's of a split, those of COCO (report alone), and DAQUAR's questions; names start with the data set."""
    if split == "report":
        flickr = read_records(data / "flickr8k" / "dev.jsonl")
        coco = read_records(data / "coco_val2017" / "captions.jsonl")
    else:
        flickr, coco = smol_splits.flickr(data)[split == "train"], []
    asked = smol_splits.daquar(data)[{"report": 0, "tune": 1, "train": 2}[split]]
    return (
        Photos({f"flickr8k/{e['image']}": e["captions"] for e in flickr}),
        Photos({f"coco_val2017/{e['image']}": e["captions"] for e in coco}),
        asked,
    )


def entries(data: Path, split: str, sizes: Sizes, seed: int = 0) -> list[Entry]:
    """Every picture of a split with all its questions, balanced over the split."""
    rng = random.Random(f"{seed}-{split}")
    flickr, coco, asked = photographs(data, split)
    names = list(flickr.captions)[: sizes.singles]
    found = _singles(flickr, names, rng, 700 if split == "train" else 25)
    share = sizes.collages // 4 if coco.captions else 0
    pools = [(flickr, sizes.collages - share), (coco, share)]
    for photos, count in pools:
        found += _collages(photos, count, rng, None if split == "train" else 20)
    vocabulary = word_list(data)
    for _ in range(sizes.words):
        words = rng.sample(vocabulary, rng.randint(1, 4))
        picture = printed(rng.choice(names), words, rng)
        found.append(Entry(picture, [Item("words", READ, [" ".join(words)])]))
    return found + _daquar(asked, sizes.daquar, rng)


def word_list(data: Path) -> list[str]:
    """The 500 most frequent words of three to seven letters in the training captions: what is printed."""
    said = Counter(w for e in smol_splits.flickr(data)[1] for w in make.words_of(e["captions"]))
    fit = [(w, n) for w, n in said.items() if 3 <= len(w) <= 7]
    return [w for w, _ in sorted(fit, key=lambda pair: (-pair[1], pair[0]))[:500]]


def _singles(photos: Photos, names: Sequence[str], rng: random.Random, per_object: int) -> list[Entry]:
    known = [{"image": name, "captions": photos.captions[name]} for name in names]
    asked = make.balanced_questions(known, per_object, rng.randrange(10**6))
    found = []
    for entry, questions in zip(known, asked, strict=True):
        captions = [make.tidy(c) for c in entry["captions"]]
        items = [Item("caption", make.DESCRIBE, captions)]
        items += [Item("exists", question, [answer]) for question, answer in questions]
        found.append(Entry(single(entry["image"]), items, captions))
    return found


def _collages(photos: Photos, count: int, rng: random.Random, at_most: int | None) -> list[Entry]:
    """Each collage has a theme, an object shown by 0 to 4 of its photographs and by no other.

    Args:
        at_most: yes/no questions about one object, of either answer.
    """
    found: list[Entry] = []
    yes, no = defaultdict(list), defaultdict(list)  # object → entries that could be asked for it
    for _ in range(count):
        size = rng.randint(1, 6)
        theme = rng.choice(photos.themes)
        times = rng.randint(0, min(size, 4))
        shown = rng.sample(photos.showing[theme], min(times, len(photos.showing[theme])))
        others = rng.sample(photos.lacking[theme], size - len(shown))
        names = [*shown, *others]
        rng.shuffle(names)
        entry = Entry(collage(names, rng))
        places = {part.photo: part.place for part in entry.picture.parts}
        entry.items.append(Item("count", f"How many pictures show {_a(theme)}?", [NUMBERS[len(shown)]]))
        alone = [p for p, place in places.items() if list(places.values()).count(place) == 1]
        for name in rng.sample(alone, min(2 if at_most is None else 1, len(alone))):
            said = [make.tidy(c) for c in photos.captions[name]]
            entry.items.append(Item("at", f"Describe the picture at the {places[name]}.", said))
        others = [t for t in photos.themes if t != theme]
        things = rng.sample(others, min(8, len(others)))
        for thing in [theme, *things]:
            holders = [name for name in names if thing in photos.there[name]]
            sure = all(name in holders or thing in photos.absent[name] for name in names)
            if len(holders) == 1 and sure and size > 1:
                question = f"Where is the picture with {_a(thing)}?"
                entry.items.append(Item("where", question, [places[holders[0]]]))
            if holders:
                yes[thing].append(entry)
            elif sure:
                no[thing].append(entry)
        found.append(entry)
    for thing in photos.themes:
        both = min(len(yes[thing]), len(no[thing]), 10**6 if at_most is None else at_most)
        for answer, holders in (("yes", yes), ("no", no)):
            for entry in rng.sample(holders[thing], both):
                entry.items.append(Item("any", f"Does any picture show {_a(thing)}?", [answer]))
    return found


def _daquar(asked: Sequence[dict[str, Any]], count: int | None, rng: random.Random) -> list[Entry]:
    of: dict[str, list[Item]] = {}
    for question in asked:
        item = Item("daquar", question["question"], [make.spoken(question["answer"])])
        of.setdefault(question["image"], []).append(item)
    names = sorted(of)
    rng.shuffle(names)
    return [Entry(single(f"daquar/{name}"), of[name]) for name in names[:count]]


def _a(thing: str) -> str:
    return make.existence_question(thing).removeprefix("Is there ").removesuffix(" in the image?")


def lookup(training: Sequence[Entry], asked: Sequence[Item]) -> list[str]:
    """Blind answers: to each question what was most often right in training, by question, else by task."""
    by_question, by_task = defaultdict(Counter), defaultdict(Counter)
    for entry in training:
        for item in entry.items:
            by_question[item.task, item.question].update(item.truth)
            by_task[item.task].update(item.truth)
    return [(by_question.get((i.task, i.question)) or by_task[i.task]).most_common(1)[0][0] for i in asked]
