"""Files of questions and answers: what is gone on with, and what is left as it is."""

from __future__ import annotations

import json

import pytest

from llava_fwd2bot.evaluation.answers import _done, read_questions
from llava_fwd2bot.files.resumable import resumable_lines

ABOUT = {"model_id": "m", "metadata": {"k": 4}}
ASKED = [{"question_id": i, "image": f"{i}.png", "text": "red?"} for i in range(3)]


def answer(i: int, prompt: str = "red?", name: object = None) -> str:
    line = {"question_id": i if name is None else name, "image": f"{i}.png", "prompt": prompt, "text": "yes", **ABOUT}
    return json.dumps(line) + "\n"


@pytest.mark.parametrize("left", [20, 60, -1], ids=["start", "middle", "end"])
def test_a_cut_line_is_answered_again(tmp_path, left):
    """Of a line that was being written nothing but the newline may be missing: then it is whole."""
    file = tmp_path / "a.jsonl"
    file.write_text(answer(0) + answer(1)[:left])
    assert _done(file, ABOUT, ASKED) == ({0, 1} if left == -1 else {0})
    assert file.read_text() == answer(0) + (answer(1) if left == -1 else "")


@pytest.mark.parametrize(
    "content",
    [
        '{"precious": 1}',
        "line one\nline two without its end",
        "a note",
        "".join(json.dumps(line) + "\n" for line in ASKED)[:-1],
        answer(0) + "something else",
        answer(0).replace('"k": 4', '"k": 8') + answer(1)[:20],
    ],
    ids=["json", "text", "note", "questions", "tail", "k"],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    """--answers may name a file by mistake, the questions say: not a byte of it may be lost."""
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="a.jsonl"):
        _done(file, ABOUT, ASKED)
    assert file.read_text() == content


def test_one_image_has_several_questions(tmp_path):
    """In LLaVA's files of TextVQA and MME question_id is the image's."""
    lines = [{"question_id": "im", "image": "0.png", "text": text} for text in ("red?", "blue?")]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_questions(file) == lines
    answers = tmp_path / "a.jsonl"
    answers.write_text(answer(0, "blue?", "im"))
    assert _done(answers, ABOUT, lines) == {1}
    assert _done(answers, ABOUT, [*lines, {**lines[0], "text": "green?"}]) == {1}
    with pytest.raises(ValueError, match="about the prompt 'blue\\?', not about 'red\\?'"):
        _done(answers, ABOUT, [lines[0], {**lines[1], "text": "green?"}])  # a prompt was changed
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    with pytest.raises(ValueError, match="'im' twice with the same text"):
        read_questions(file)
    file.write_text(json.dumps({**lines[0], "question_id": ["im"]}))
    with pytest.raises(ValueError, match="question 1: question_id must be"):
        read_questions(file)


def test_lines_of_scores_go_on(tmp_path):
    file = tmp_path / "s.jsonl"
    assert resumable_lines(file) == []
    file.write_text('{"scores": [1]}\n{"sco')
    assert resumable_lines(file) == [{"scores": [1]}] and file.read_text() == '{"scores": [1]}\n'
    for lost in (b"\0" * 20, b'{"sc\0\0'):  # what a power cut may leave
        file.write_bytes(b'{"scores": [1]}\n' + lost)
        assert resumable_lines(file) == [{"scores": [1]}] and file.read_text() == '{"scores": [1]}\n'
