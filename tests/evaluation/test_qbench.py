"""LLaVA's module for Q-Bench does not exist, so that questions and scorer are ours."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

QBENCH = Path(__file__).parents[2] / "eval" / "llava_suite" / "qbench.py"


def test_qbench_in_and_out():
    """LLaVA's module for it does not exist: the questions and the scorer are ours, so they are held here."""
    suite = runpy.run_path(str(QBENCH))
    records = [
        {"img_path": "a.jpg", "question": "How sharp?", "candidates": ["Blurry", "Sharp"], "correct_ans": "Sharp"},
        {"img_path": "b.jpg", "question": "Dark?", "candidates": ["Yes", "No"], "correct_ans": "No"},
    ]
    asked = suite["questions"](records)
    assert asked[0]["image"] == "a.jpg" and asked[0]["text"].startswith("How sharp?\nA. Blurry\nB. Sharp\nAnswer with")
    for first, second, expected in (("B", "No.", 1.0), ("(B) Sharp", "A", 0.5), ("Avoid", "sharp", 0.0)):
        said = [{"question_id": 0, "text": first}, {"question_id": 1, "text": second}]
        lines, accuracy = suite["submission"](records, said)
        assert accuracy == expected and lines[0]["response"] == first
    with pytest.raises(ValueError, match="the first is record 1"):
        suite["submission"](records, said[:1])
    assert suite["submission"]([{**records[0]}, {"img_path": "b", "question": "", "candidates": []}], said)[1] is None


def test_qbench_refuses_what_would_be_another_score():
    """A record answered twice or not at all, or an option without a letter, moved the accuracy and showed nowhere."""
    suite = runpy.run_path(str(QBENCH))
    assert suite["chosen"]("A bit dark", ["Dark", "Bright"]) is None
    said = ("A", "(B)", "A. x", "B: y", "B, y", "C", "B\nIt is.", "A - x", "B y", "A;", "A B", "Ay", "")
    assert [suite["chosen"](text, ["x", "y"]) for text in said] == [
        *(0, 1, 0, 1, 1, None, 1, 0, 1, 0, None, None, None)
    ]
    record = {"img_path": "a", "question": "q", "candidates": ["Good", "Bad"], "correct_ans": "Good"}
    for lines, message in (
        ([(0, "A"), (0, "B")], "Record 0 has two answers"),
        ([(0, "A"), (7, "A")], "Answer 2 is to question 7; records are 0 to 0"),
        ([("0", "A")], "Answer 1 is to question '0'"),
        ([(0, None)], "must be a text, not None"),
    ):
        with pytest.raises(ValueError, match=message):
            suite["submission"]([record], [{"question_id": name, "text": text} for name, text in lines])
    for records, message in (
        ([{**record, "candidates": list("abcdefghi")}], "record 0 has 9 options, more than the letters A to H"),
        ([{"question": "q", "candidates": ["a"]}], "record 0: img_path missing or of another kind"),
        ({"question": "q"}, "must hold a list of records"),
    ):
        with pytest.raises(ValueError, match=message):
            suite["checked"](records, Path("dev.json"))


def test_qbench_by_command(tmp_path, monkeypatch, capsys):
    """U+2028 ends no line of JSON; damage is named, not a traceback; answers that nobody gets are not scored."""
    main = runpy.run_path(str(QBENCH))["main"]
    records, answers = tmp_path / "dev.json", tmp_path / "a.jsonl"
    record = {"img_path": "a", "question": "q", "candidates": ["Good", "Bad"], "correct_ans": "Good"}
    records.write_text(json.dumps([record]))
    argv = [str(QBENCH), str(records), "--answers", str(answers), "--submission", str(tmp_path / "s.jsonl")]
    monkeypatch.setattr(sys, "argv", argv)
    answers.write_text('{"question_id": 0, "text": "A. Good\u2028."}\n', encoding="utf-8")
    main()
    assert capsys.readouterr().out == "accuracy: 100 % (n = 1)\n"
    answers.write_text('{"question_id": 0, "text": " "}\n', encoding="utf-8")
    main()  # greedy decoding would say nothing again: it counts as LLaVA's own scorers count it, and is told
    told = capsys.readouterr()
    assert (
        told.out == "accuracy: 0 % (n = 1)\n"
        and "1 of 1 answers are empty, and wrong; the first: records 0" in told.err
    )
    answers.write_text('{"question_id": 0, "te')
    with pytest.raises(SystemExit):
        main()
    assert "a.jsonl: not JSON at line 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", argv[:4])
    with pytest.raises(SystemExit):
        main()
    assert "--answers and --submission go together" in capsys.readouterr().err
