"""Ten questions in one conversation and many images in one prompt, on toys."""

from __future__ import annotations

import json
import random

import pytest

from eval.studies import use
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.smol import instructions as make

CAPTIONS = ["A dog runs over the grass.", "Two men play football.", "A cat sleeps.", "A bus drives down the street."]


@pytest.fixture
def data(tmp_path, photos):
    folder = tmp_path / "data" / "flickr8k"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(12):
        (folder / "images" / f"{number}.png").write_bytes((photos / "b.png").read_bytes())
        rows.append({"image": f"{number}.png", "captions": [CAPTIONS[number % len(CAPTIONS)]]})
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


def test_both_parts_run_and_resume(checkpoint, data, tmp_path, monkeypatch):
    """Every side answers every question; what is kept is not asked again, and gives the same page."""
    output = tmp_path / "use.json"
    argv = ["--data", data, "--model", checkpoint, "--output", output, "--k", 4, "--prompts", 2, "--most", 5]
    argv = [str(value) for value in argv]
    use.main(argv)
    found, page = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    rows = found["rows"]
    assert {row["side"] for row in rows} == {"base", "k = 4"}
    count = {part: sum(row["part"] == part for row in rows) for part in ("turns", "alone", "images")}
    assert count["turns"] == count["alone"] == 2 * found["images"] * use.TURNS and count["images"] == 2 * 3 * 2
    assert "| 8 to 10 |" in page and "| 5 |" in page and "| 50 |" not in page

    monkeypatch.setattr(use.Side, "__call__", lambda *args: pytest.fail("it was asked again"))
    use.main(argv)
    assert output.with_suffix(".md").read_text() == page


def test_a_conversation_holds_the_answers_before(data):
    """The second prompt has the first question and what the model said to it, and one image."""
    entries = read_records(data / "flickr8k" / "dev.jsonl")[:1]
    asked = [use.questions_of(entry["captions"], random.Random(0)) for entry in entries]
    seen = []

    class Parrot:
        name = "parrot"

        def __call__(self, talks, about):
            seen.append([turn["value"] for turn in talks[0]])
            return ["No"] * len(talks)

    rows = list(use.turns(Parrot(), asked))
    first, alone, second = seen[:3]
    assert alone == first == [f"<image>\n{asked[0][0][0]}"] and second == [*first, "No", asked[0][1][0]]
    assert [row.right for row in rows if row.part == "turns"] == [right for _, right in asked[0]]
    assert {row.said for row in rows} == {"no"}


def test_an_object_is_in_one_image_or_in_none(data):
    """Half of the prompts are right with yes: one image shows the object; else none may show it."""
    entries = read_records(data / "flickr8k" / "dev.jsonl")
    known = [make.objects_in(entry["captions"]) for entry in entries]
    for chosen, name, right in use.sets_of(known, 5, 20, random.Random(1)):
        there = [name in known[i][0] for i in chosen]
        assert len(set(chosen)) == 5 and sum(there) == (right == "yes")
    with pytest.raises(ValueError, match="too few for prompts of 50"):
        list(use.sets_of(known, 50, 2, random.Random(1)))


def test_balanced_accuracy():
    """Answering always no is right half of the time, whatever the share of no; an answer that is neither is wrong."""
    rows = [{"group": i % 5, "right": "yes" if i < 3 else "no", "said": "no"} for i in range(20)]
    assert use.balanced(rows)[0] == 50
    assert use.balanced([{**row, "said": None} for row in rows])[0] == 0
    figure, (low, high) = use.balanced([{**row, "said": row["right"]} for row in rows])
    assert figure == low == high == 100
