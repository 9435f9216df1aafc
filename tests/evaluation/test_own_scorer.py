"""Scores of one's own questions: the first thing that a user has, where no benchmark fits."""

from __future__ import annotations

import pytest
from score_toys import score, write

from llava_fwd2bot.cli.main import main


@pytest.fixture
def files(tmp_path):
    def make(texts, right):
        said = write(tmp_path / "a.jsonl", [{"question_id": i, "text": t} for i, t in enumerate(texts)])
        truth = write(tmp_path / "q.jsonl", [{"question_id": i, "answer": a} for i, a in enumerate(right)])
        return ("own", "--answers", said, "--ground-truth", truth)

    return make


@pytest.mark.parametrize(
    ("match", "texts", "right", "expected"),
    [
        ("exact", ["A red Bus.", "two", "bus"], ["red bus", ["2", "three"], "car"], 200 / 3),
        ("soft", ["cat", "dog"], [["cat"] * 2 + ["dog"] * 8, ["dog", "dog", "cat"]], 100 * (0.6 + 2 / 3) / 2),
        ("yes-no", ["Yes, there is.", "No", "maybe"], ["yes", "yes", "no"], 100 / 3),
        ("choice", ["B. a cat", "(a)", "Cats"], ["B", "B", "C"], 100 / 3),
    ],
)
def test_each_way_to_compare(files, capsys, match, texts, right, expected):
    """By hand; `Cats` begins with a C and is not the letter C."""
    assert score(capsys, *files(texts, right), "--match", match)["accuracy"] == pytest.approx(expected)


def test_figures_are_printed_with_their_items(files, capsys):
    """24 questions gave "66.67": no decimal of that is known, and nothing said of how many questions it was."""
    for count, shown in ((24, "accuracy      67  (n = 24)"), (1200, "accuracy    66.7  (n = 1,200)")):
        argv = files(["yes", "yes", "no"] * (count // 3), ["yes"] * count)
        assert main(["eval", "score", *map(str, argv)]) == 0
        assert capsys.readouterr().out == f"{shown}\n"


def test_what_does_not_fit_is_refused(files, capsys):
    """A truth of another kind would count every answer as wrong."""
    for texts, right, message in ((["yes"], ["red"], "is not yes or no"), (["yes"], ["yes", "no"], "no answer")):
        argv = files(texts, right)
        assert main(["eval", "score", *map(str, argv), "--match", "yes-no"]) == 1
        assert message in capsys.readouterr().err
    argv = files(["yes"], ["yes"])
    assert main(["eval", "score", "pope", *map(str, argv[1:]), "--match", "exact"]) == 2
    assert "--match requires own" in capsys.readouterr().err
