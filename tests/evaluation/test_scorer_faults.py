"""What the benchmarks' scorers refuse: silence, parts, other splits, files that do not fit."""

from __future__ import annotations

import json

import pytest
from score_toys import PEOPLE, POPE, SEED, TABLE, TEXT, TOYS, as_lines, toy_score, write

from llava_fwd2bot.cli.main import main
from llava_fwd2bot.evaluation import scorers


@pytest.mark.parametrize("name", TOYS)
def test_no_scorer_takes_silence_or_part_or_more(tmp_path, name):
    """POPE's script takes an empty answer for yes, VQA's for an article; parts and other splits look like the whole."""
    right = TOYS[name][1]
    values = toy_score(tmp_path, name, right).per_item.values()
    assert set(values) == {1.0} and set(toy_score(tmp_path, name, dict.fromkeys(right, " ")).per_item.values()) == {0.0}
    with pytest.raises(ValueError, match="no answer|0 answers were given"):
        toy_score(tmp_path, name, dict(list(right.items())[1:]))
    other = ("zz/9.png", "Who?\nShortly.") if isinstance(next(iter(right)), tuple) else "zz"
    with pytest.raises(ValueError, match=f"1 of {len(right) + 1} answers are to .* .?'zz|has no question"):
        toy_score(tmp_path, name, right | {other: "A"})


@pytest.mark.parametrize(
    "name, stem, content, message",
    [
        ("vqav2", "t", {"annotations": [{"question_id": 1, "answers": PEOPLE[1:]}]}, "has 9 answers to question 1"),
        ("vizwiz", "t", [{"image": "a.jpg", "answers": PEOPLE[1:]}], "has 9 answers to the question about a.jpg"),
        (
            "vizwiz",
            "t",
            [{"image": "a.jpg"}, {"image": "b.jpg", "answers": PEOPLE}],
            "1 of the 2 images of .* Ask about all",
        ),
        ("vizwiz", "t", [{"image": "a.jpg", "answers": PEOPLE}] * 2, "t.json: 'a.jpg' occurs twice"),
        ("vizwiz", "t", [{"image": "b.jpg", "answers": PEOPLE}], "nothing about 1 of the 1 images .* a.jpg"),
        ("vizwiz", "q", as_lines([{"question_id": 7, "image": "a.jpg"}] * 2), "q.jsonl: 'a.jpg' occurs twice"),
        ("gqa", "t", {}, "holds no balanced question"),
        ("gqa", "t", {"1": {"isBalanced": True}}, "question '1' has no answer"),
        ("mme", "a", "Red?\tYes\n", "a.txt must hold two lines"),
        ("mme", "a", "Red?\tYes\nBlue?\tNo\nTwo?\tNo\n", "a.txt must hold two lines"),
        ("mme", "a", "Red?\tYes\nBlue?\tMaybe\n", "a.txt must hold two lines"),
        (
            "seed",
            "t",
            {"questions": [SEED, SEED | {"question_id": "01"}], "question_type": {"S": 1}},
            "1 occurs twice",
        ),
        ("seed", "t", {"questions": [SEED], "question_type": {"accuracy": 1}}, "a group named 'accuracy'"),
        ("seed", "t", {"questions": [SEED], "question_type": {"image": 1}}, "a group named 'image'"),
        ("seed", "t", {"questions": [SEED], "question_type": {"S": 2}}, "question 1 has type 1, which"),
        ("mmbench", "t", TABLE.replace("B\tk", "C\tk"), "the answer 'C' of 1000001 is not one of its options"),
        ("mmbench", "t", TABLE + "1\tx\ty\tB\tk\n", "the index 1 occurs twice"),
        ("mmbench", "t", TABLE.replace("\n1\t", "\n2000001\t"), "no answer to question 2000001"),
        ("mmbench", "t", TABLE.replace("\n1\t", "\n1.0\t"), "row 1 has the index '1.0'"),
        ("mmbench", "t", TABLE.replace("\tB\tk", "\t\tk"), "1 of 2 rows have no answer, the first: 1000001"),
        ("mmbench", "t", TABLE.replace("k\n", "circular\n"), "a group named 'circular'"),
        ("mmbench", "t", TABLE.split("\n")[0], "holds no question"),
        ("gqa", "t", "{", "t.json is not valid JSON"),
        ("gqa", "t", [], "t.json holds a JSON list"),
        ("vqav2", "t", {"questions": []}, "t.json: not in the format of vqav2's files .*KeyError"),
        ("vizwiz", "t", [1], "t.json.*: not in the format of vizwiz's files"),
        ("textvqa", "t", {"data": [TEXT, TEXT]}, "'what.'. occurs twice"),
        ("textvqa", "t", {"data": [TEXT | {"answers": "a" * 10}]}, "answers to 'what.'"),
        (
            "scienceqa",
            "problems",
            {"1": {"answer": "0", "choices": ["x"], "image": "i.png"}},
            "the answer to '1' is '0', no choice's number",
        ),
        ("pope", "coco_pope_random", as_lines([POPE[0] | {"label": "Yes"}]), "is 'Yes', which is neither"),
        (
            "pope",
            "coco_pope_random",
            as_lines([POPE[0] | {"label": x} for x in ("yes", "no")]),
            "contradicts an earlier one",
        ),
        (
            "pope",
            "coco_pope_random",
            as_lines([POPE[i % 2] | {"image": f"{i}.jpg", "label": "yes"} for i in range(20)]),
            "asks 2 of the 20 questions of random",
        ),
    ],
)
def test_ground_truth_that_does_not_fit(tmp_path, name, stem, content, message):
    """Damaged, a part, or of names that would write over figures: the figure would look like one of the whole."""
    with pytest.raises(ValueError, match=message):
        toy_score(tmp_path, name, TOYS[name][1], **{stem: content})


def test_what_may_be_left_unanswered(tmp_path):
    """Questions of text alone and videos, as in LLaVA's scripts; where images are left out how many is told."""
    problems = {str(i): {"answer": 0, "choices": ["x"], "image": "i.png" if i < 3 else None} for i in range(4)}
    files = {"problems": problems, "pid_splits": {"test": list(problems)}}
    found = toy_score(tmp_path, "scienceqa", dict.fromkeys("012", "A"), **files)
    assert found.figures == {"accuracy": 75.0, "image": 100.0} and next(iter(found.figures)) == "image"
    assert found.per_item == {"0": 1.0, "1": 1.0, "2": 1.0}  # of the figure that papers give
    with pytest.raises(ValueError, match="2 of 3 questions with an image in .* have no answer, the first: '1'"):
        toy_score(tmp_path, "scienceqa", {"0": "A"}, **files)
    asked = [SEED | {"question_id": str(i)} for i in range(3)]
    with pytest.raises(ValueError, match="2 of 3 questions about images in .* have no answer, the first: 1"):
        toy_score(tmp_path, "seed", {0: "A"}, t={"questions": asked, "question_type": {"Scene": 1}})
    with pytest.raises(ValueError, match="1 occurs twice"):
        toy_score(tmp_path, "seed", {1: "A", "1": "B"})
    with pytest.raises(ValueError, match="rotations of question 1, but no row 1"):
        toy_score(tmp_path, "mmbench", {1000001: "B"}, t=TABLE.replace("1\tx\ty\tA\tk\n", "", 1))


def test_mmvet_is_converted(tmp_path, capsys):
    said = write(tmp_path / "a.jsonl", [{"question_id": 0, "text": "x"}])
    assert main(["eval", "score", "mmvet", "--answers", str(said), "--submission", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == {"v1_0": "x"} and "offline" in capsys.readouterr().out
    for names, message in ((["v1_0"], "prefix v1_ already"), ([1, "1"], "'1' occurs twice")):
        with pytest.raises(ValueError, match=message):
            scorers.scorer("mmvet")({name: {"text": "x"} for name in names})


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": 1, "text": "b"}\n', "answer to 1 occurs twice"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "not JSON at line 2"),
        ('{"question_id": 1, "text": " "}\n', "1 of 1 answers are empty, the first: 1"),
        ('{"question_id": 1, "answer": "a"}\n', "without question_id or text"),
        ("\n", "no records"),
        (
            '{"question_id": 1, "text": "a", "model_id": "m"}\n{"question_id": 2, "text": "a", "model_id": "n"}\n',
            "several models: m, n",
        ),
        (as_lines([{"question_id": k, "text": "a", "metadata": {"k": k}} for k in (4, 8)]), "several k: 4, 8"),
        (
            as_lines([{"question_id": c, "text": "a", "metadata": {"k": 4, "codec": c}} for c in ("int2", "int4")]),
            "several codecs: int2, int4",
        ),
        (
            as_lines([{"question_id": k, "text": "a", "metadata": {"k": 4, "fingerprint": k}} for k in "mn"]),
            "several fingerprints: m, n",
        ),
        ('{"question_id": null, "text": "a"}\n', "a.jsonl: the answer to None has no 'question_id'"),
    ],
)
def test_answers_that_must_not_be_averaged(tmp_path, capsys, text, message):
    """A half-written or mixed file would give a figure that looks like one."""
    (tmp_path / "a.jsonl").write_text(text)
    argv = ["eval", "score", "gqa", "--answers", str(tmp_path / "a.jsonl"), "--ground-truth", str(tmp_path / "x")]
    assert main(argv) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mme", "textvqa"])
def test_answers_need_what_tells_them_apart(tmp_path, capsys, name):
    """Another benchmark's file would end in a KeyError, which tells nobody what is wrong."""
    said = write(tmp_path / "a.jsonl", [{"question_id": "1", "text": "a"}])
    assert main(["eval", "score", name, "--answers", str(said), "--ground-truth", str(tmp_path)]) == 1
    assert "a.jsonl: the answer to '1' has no 'prompt'" in capsys.readouterr().err


def test_two_answers_to_one_question(tmp_path):
    """LLaVA asks TextVQA with OCR tokens or without: of two runs in one file the last would win."""
    prompts = ["What?\nShortly.", "What?\nReference OCR token: Q\nShortly."]
    with pytest.raises(ValueError, match="'what.'. occurs twice"):
        toy_score(tmp_path, "textvqa", {("im", prompt): "a" for prompt in prompts})


def test_k_that_is_told_is_that_of_the_answers(tmp_path, capsys):
    (tmp_path / "gt.json").write_text(json.dumps({"1": {"answer": "a"}}))
    said = write(tmp_path / "a.jsonl", [{"question_id": "1", "text": "a", "metadata": {"k": 4}}])
    argv = ["eval", "score", "gqa", "--answers", str(said), "--ground-truth", str(tmp_path / "gt.json")]
    assert main([*argv, "--k", "8"]) == 1 and "were made with k = 4, but --k is 8" in capsys.readouterr().err
    assert main([*argv, "--k", "4"]) == 0
    assert main([*argv, "--output", str(tmp_path)]) == 1 and "--output is a folder" in capsys.readouterr().err


def test_a_part_is_not_taken_for_the_whole(tmp_path, capsys):
    (tmp_path / "gt.json").write_text(json.dumps({"1": {"answer": "a"}, "2": {"answer": "b"}}))
    said = write(tmp_path / "a.jsonl", [{"question_id": "1", "text": "a"}])
    argv = ["eval", "score", "gqa", "--answers", str(said)]
    assert main([*argv, "--ground-truth", str(tmp_path / "gt.json")]) == 1
    assert "no answer to question '2'" in capsys.readouterr().err
    assert main(argv) == 1 and "gqa needs --ground-truth (testdev_balanced" in capsys.readouterr().err
