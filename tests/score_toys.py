"""A toy of each benchmark, answers as files, and the command that scores them."""

from __future__ import annotations

import json
from pathlib import Path

from llava_fwd2bot.cli.main import main
from llava_fwd2bot.evaluation import scorers


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text(as_lines(lines))
    return path


def score(capsys, *argv: str) -> dict:
    assert main(["eval", "score", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["figures"]


PEOPLE = [{"answer": word} for word in ["a", "the"] * 5]  # made plain nothing is left of them: an empty answer matches
TABLE = "index\tA\tB\tanswer\tcategory\n1\tx\ty\tA\tk\n1000001\ty\tx\tB\tk\n"
SEED = {"question_id": "1", "question_type_id": 1, "answer": "A", "data_type": "image"}
POPE = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a cat in the image?"} for i in range(2)]
TEXT = {"image_id": "im", "question": "What?", "answers": ["a"] * 10}
TOYS = {  # benchmark → its files, the first (or where it lies) the ground truth, and right answers
    "pope": (
        {
            "coco_pope_random.json": as_lines([POPE[0] | {"label": "yes"}, POPE[1] | {"label": "no"}]),
            "q.jsonl": as_lines([line | {"category": "random"} for line in POPE]),
        },
        {0: "Yes", 1: "No"},
    ),
    "textvqa": (
        {"t.json": {"data": [TEXT]}},
        {("im", "What?\nShortly."): "a"},
    ),
    "vqav2": ({"t.json": {"annotations": [{"question_id": 1, "answer_type": "other", "answers": PEOPLE}]}}, {1: "a"}),
    "vizwiz": (
        {
            "t.json": [{"image": "a.jpg", "answers": [{"answer": ""}] * 10}],
            "q.jsonl": as_lines([{"question_id": 7, "image": "a.jpg"}]),
        },
        {7: "a"},
    ),
    "gqa": ({"t.json": {"1": {"answer": "cat", "isBalanced": True}}}, {"1": "Cat."}),
    "mme": (
        {"count/a.txt": "Red?\tYes\nBlue?\tNo\n"},
        {("count/a.png", "Red?"): "Yes", ("count/a.png", "Blue?"): "No"},
    ),
    "scienceqa": (
        {
            "problems.json": {"1": {"answer": 0, "choices": ["x", "y"], "image": "image.png"}},
            "pid_splits.json": {"test": ["1"]},
        },
        {"1": "A"},
    ),
    "seed": ({"t.json": {"questions": [SEED], "question_type": {"Scene": 1}}}, {1: "A"}),
    "mmbench": ({"t.tsv": TABLE}, {1: "A", 1000001: "B"}),
}


def toy_score(folder: Path, name: str, texts: dict, **files: object) -> scorers.Score:
    """The score of `texts` on a toy of the benchmark, whose `files` (a stem each) are others."""
    for path, content in TOYS[name][0].items():
        content = files.get(Path(path).stem, content)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))
    first = next(iter(TOYS[name][0]))
    given = {"ground_truth": folder if name in ("pope", "mme", "scienceqa") else folder / first}
    given |= {"questions": folder / "q.jsonl"} if (folder / "q.jsonl").is_file() else {}
    return scorers.scorer(name)({key: {"text": text, "prompt": "<image>"} for key, text in texts.items()}, **given)
