"""Instructions made from human captions and questions: LLaVA's records, and yes/no questions in POPE's way.

Nothing here is invented by a model. An object is in a picture where one of its captions names it, and counts as absent
only where no caption names it, nor anything that might be it. Colours, numbers and actions are asked for where the
captions of a picture do not contradict each other.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

DESCRIBE = "Describe the image in one sentence."
_HUMAN = (
    "man men guy guys gentleman male woman women lady ladies female boy boys girl girls child children kid kids "
    "toddler toddlers baby infant person people someone somebody player players rider adult adults couple crowd group "
    "team family friends teenager teenagers biker skier surfer skateboarder snowboarder climber runner hiker "
    "individual bicyclist cyclist worker soldier performer swimmer dancer fans band"
)
# name: words that say it is there; words that leave it open
OBJECTS: dict[str, tuple[str, str]] = {
    "person": (_HUMAN, "he she they his her someone's"),
    "man": ("man men guy guys gentleman", f"{_HUMAN} he his"),
    "woman": ("woman women lady ladies", f"{_HUMAN} she her"),
    "boy": ("boy boys", f"{_HUMAN} he his"),
    "girl": ("girl girls", f"{_HUMAN} she her"),
    "dog": ("dog dogs puppy puppies", "animal animals retriever greyhound greyhounds poodle collie terrier"),
    "horse": ("horse horses", "animal animals rider pony rodeo bull"),
    "bird": ("bird birds seagull seagulls", "animal animals duck ducks pigeons goose geese flock"),
    "ball": ("ball balls football basketball soccer baseball", "tennis toy volleyball game sport"),
    "bicycle": ("bicycle bicycles bike bikes", "biker bikers cyclist motorcycle bicyclist rider ride"),
    "motorcycle": ("motorcycle motorcycles motorbike", "bike bikes biker motocross rider vehicle atv dirt"),
    "car": ("car cars", "vehicle vehicles truck van jeep racing traffic street road taxi"),
    "skateboard": ("skateboard skateboards", "skateboarder skateboarding skater board skating"),
    "surfboard": ("surfboard surfboards", "surfer surfing surfs surf board wave waves"),
    "boat": ("boat boats canoe kayak sailboat raft", "ship water lake river ocean"),
    "hat": ("hat hats cap caps", "helmet hood hooded headgear beanie costume uniform turban"),
    "helmet": ("helmet helmets", "biker rider gear uniform hat football motorcycle bike climber skateboarder"),
    "pair of sunglasses": ("sunglasses", "glasses goggles shades"),
    "tree": ("tree trees forest woods wooded", "branch branches park outside yard hill bushes leaves background"),
    "snow": ("snow snowy", "ski skier snowboarder snowboard sled ice winter white mountain"),
    "grass": ("grass grassy lawn", "field park yard outside hill green soccer meadow"),
    "water": ("water ocean lake river pool sea pond creek stream", "beach wave waves swim swimming boat wet splashing"),
    "beach": ("beach", "sand sandy shore ocean water waves sea"),
    "mountain": ("mountain mountains", "hill cliff rock rocks rocky peak slope climber"),
    "building": ("building buildings house houses", "street city store outside town window wall"),
    "fence": ("fence fences", "railing gate rail barrier yard"),
    "bench": ("bench benches", "seat sitting sits chair"),
    "table": ("table tables", "desk counter restaurant sitting dinner"),
    "camera": ("camera cameras", "photo photographer picture photograph"),
    "rope": ("rope ropes", "leash climbing climber swing string tire"),
    "flower": ("flower flowers", "garden plant plants bush bouquet"),
    "frisbee": ("frisbee frisbees", "disc toy object"),
    "guitar": ("guitar guitars", "instrument instruments music band"),
    "swing": ("swing swings swinging", "playground rope"),
    "umbrella": ("umbrella umbrellas", "parasol rain"),
    "tent": ("tent tents", "camp camping"),
    "bus": ("bus buses", "vehicle traffic"),
    "train": ("train trains", "track tracks subway station"),
    "cat": ("cat cats kitten", "animal animals"),
    "elephant": ("elephant elephants", "animal animals"),
}
_WORDS = {name: (set(a.split()), set(b.split()) | set(a.split())) for name, (a, b) in OBJECTS.items()}
COLOURS = "black white brown red blue green yellow orange pink purple tan gray".split()
NUMBERS = "two three four five six".split()
_COLOURED = re.compile(rf"\b({'|'.join([*COLOURS, 'grey'])}) (?:and (\w+) )?(\w+)")
_NUMBERED = re.compile(rf"\b({'|'.join(NUMBERS)}) (?:\w+ )?(dogs|men|women|boys|girls|people|children|kids|horses)\b")
_ACTING = re.compile(r"\b(dog|man|woman|boy|girl|child|person)s? (?:is |are )?(\w{3,}ing)\b")
_UNCOUNTED = ("snow", "grass", "water")
_COLOURABLE = "dog shirt jacket hat dress coat ball bike car horse helmet shorts pants suit bird frisbee".split()


def words_of(captions: Sequence[str]) -> set[str]:
    return {word for caption in captions for word in re.findall(r"[a-z]+", caption.lower())}


def objects_in(captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """The objects that the captions name, and those that they leave no room for."""
    words = words_of(captions)
    there = [name for name, (sure, _) in _WORDS.items() if words & sure]
    absent = [name for name, (_, possible) in _WORDS.items() if not words & possible]
    return there, absent


def existence_question(name: str) -> str:
    article = "" if name in _UNCOUNTED else "an " if name[0] in "aeiou" else "a "
    return f"Is there {article}{name} in the image?"


def short_questions(captions: Sequence[str]) -> list[tuple[str, str]]:
    """Questions of one word about colour, number and action, where the captions agree."""
    colour: dict[str, Counter] = {}
    number: dict[str, Counter] = {}
    action: dict[str, Counter] = {}
    for caption in (c.lower() for c in captions):
        for first, second, noun in _COLOURED.findall(caption):
            noun = "dog" if noun == "puppy" else noun
            if noun in _COLOURABLE:
                said = f"{first} and {second}" if second in COLOURS else first
                colour.setdefault(noun, Counter())[said.replace("grey", "gray")] += 1
        for count, noun in _NUMBERED.findall(caption):
            number.setdefault(noun, Counter())[count] += 1
        for noun, doing in _ACTING.findall(caption):
            if doing not in ("wearing", "being", "during"):
                action.setdefault(noun, Counter())[doing] += 1
    found = []
    for kinds, question in ((colour, "What color is the {}?"), (number, "How many {} are there?")):
        found += [(question.format(noun), next(iter(said))) for noun, said in kinds.items() if len(said) == 1]
    for noun, said in action.items():
        best, times = said.most_common(1)[0]
        if times >= 2 or len(said) == 1:
            found.append((f"What is the {noun} doing?", best))
    return found


def balanced_questions(entries: Sequence[dict[str, Any]], per_object: int, seed: int) -> list[list[tuple[str, str]]]:
    """Yes/no questions for each entry, for training: of each object as many "yes" as "no", so that the question alone
    tells nothing. At most `per_object` of either."""
    rng = random.Random(seed)
    there: dict[str, list[int]] = {name: [] for name in OBJECTS}
    absent: dict[str, list[int]] = {name: [] for name in OBJECTS}
    for i, entry in enumerate(entries):
        for names, places in zip(objects_in(entry["captions"]), (there, absent), strict=True):
            for name in names:
                places[name].append(i)
    asked: list[list[tuple[str, str]]] = [[] for _ in entries]
    for name in OBJECTS:
        count = min(len(there[name]), len(absent[name]), per_object)
        for places, answer in ((there, "yes"), (absent, "no")):
            for i in rng.sample(places[name], count):
                asked[i].append((existence_question(name), answer))
    for questions in asked:
        rng.shuffle(questions)
    return asked


def pope_questions(
    entries: Sequence[dict[str, Any]], kind: str, per_image: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Yes/no questions in the way of POPE (Li et al., 2023): of each picture as many present objects as absent ones.

    Args:
        kind: absent objects are drawn at "random", or are the most "popular" ones of all pictures, or, "adversarial",
            those that most often stand beside the present ones.

    Returns:
        `{"image", "question", "answer", "kind"}`, yes and no in turn.
    """
    rng = random.Random(f"{seed}-{kind}")
    named = [objects_in(entry["captions"]) for entry in entries]
    popular = by_frequency(entries)
    beside = {name: Counter(other for there, _ in named if name in there for other in there) for name in OBJECTS}
    found = []
    for entry, (there, absent) in zip(entries, named, strict=True):
        count = min(len(there), len(absent), per_image)
        if kind == "random":
            no = rng.sample(absent, count)
        elif kind == "popular":
            no = sorted(absent, key=popular.index)[:count]
        elif kind == "adversarial":
            no = sorted(absent, key=lambda name: -sum(beside[other][name] for other in there))[:count]
        else:
            raise ValueError(f"kind must be random, popular or adversarial, got {kind!r}")
        for yes_name, no_name in zip(rng.sample(there, count), no, strict=True):
            for name, answer in ((yes_name, "yes"), (no_name, "no")):
                found.append(
                    {"image": entry["image"], "question": existence_question(name), "answer": answer, "kind": kind}
                )
    return found


def by_frequency(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The objects, the most frequently named first."""
    seen = Counter(name for entry in entries for name in objects_in(entry["captions"])[0])
    return [name for name, _ in seen.most_common()] + [name for name in OBJECTS if name not in seen]


def record(image: str, turns: Sequence[tuple[str, str]], **more: Any) -> dict[str, Any]:
    """One of LLaVA's records; the picture stands before the first question."""
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": question if i else f"<image>\n{question}"})
        conversations.append({"from": "gpt", "value": answer})
    return {"image": image, "conversations": conversations, **more}


def tidy(caption: str) -> str:
    """A caption as a sentence: "A dog runs ." -> "A dog runs." """
    text = re.sub(r"\s+([.,;!?'])", r"\1", caption.strip()).rstrip(". ")
    return f"{text[:1].upper()}{text[1:]}."


def describe_records(entries: Sequence[dict[str, Any]], per_image: int, seed: int) -> list[dict[str, Any]]:
    """Captions alone, for LLaVA's first stage: up to `per_image` of each picture's."""
    rng = random.Random(seed)
    return [
        record(entry["image"], [(DESCRIBE, tidy(caption))])
        for entry in entries
        for caption in rng.sample(entry["captions"], min(per_image, len(entry["captions"])))
    ]


def caption_records(
    entries: Sequence[dict[str, Any]], per_image: int, seed: int, questions: int = 2
) -> list[dict[str, Any]]:
    """For the second stage: each record asks up to two questions made of the captions, then for a description.

    The description stands last: questions after it could be answered from it.
    """
    rng, records = random.Random(seed), []
    for entry, asked in zip(entries, balanced_questions(entries, 700, seed), strict=True):
        captions = rng.sample(entry["captions"], min(per_image, len(entry["captions"])))
        short = short_questions(entry["captions"])
        rng.shuffle(short)
        for i, caption in enumerate(captions):
            turns = [*asked[i::per_image], *short[i::per_image]][:questions]
            rng.shuffle(turns)
            records.append(record(entry["image"], [*turns, (DESCRIBE, tidy(caption))]))
    return records


def question_records(entries: Sequence[dict[str, Any]], per_record: int, seed: int) -> list[dict[str, Any]]:
    """Human questions about a picture (entries of image, question, answer), `per_record` of them in each record."""
    rng, of = random.Random(seed), {}
    for entry in entries:
        of.setdefault(entry["image"], []).append((entry["question"], spoken(entry["answer"])))
    records = []
    for image, asked in of.items():
        rng.shuffle(asked)
        records += [record(image, asked[i : i + per_record]) for i in range(0, len(asked), per_record)]
    return records


def spoken(answer: str) -> str:
    """DAQUAR's answers as a person writes them: "night_stand" -> "night stand"."""
    return answer.replace("_", " ").strip()


def split_by_image(
    entries: Sequence[dict[str, Any]], sizes: Sequence[int], seed: int = 0
) -> list[list[dict[str, Any]]]:
    """Entries in groups of `sizes` images and the rest, no image in two groups."""
    images = sorted({entry["image"] for entry in entries})
    random.Random(seed).shuffle(images)
    group, at = {}, 0
    for number, size in enumerate(sizes):
        group.update(dict.fromkeys(images[at : at + size], number))
        at += size
    return [[e for e in entries if group.get(e["image"], len(sizes)) == n] for n in range(len(sizes) + 1)]
