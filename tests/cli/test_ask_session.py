"""`fwd2bot ask --interactive`: what is loaded is loaded once, and no line ends the session but /quit and its like."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from cli_fixtures import QUESTION, SHORT

import llava_fwd2bot.cli.ask_session as ask_session

pytest.importorskip("lancedb")


@pytest.fixture
def cache(run, checkpoint, photos, tmp_path):
    path = tmp_path / "p.cache"
    command = ("compress", "--model", checkpoint, "--images", photos, "--cache", path, "--codec", "float16")
    assert run(*command, "--device", "cpu", "--batch-size", 1)[0] == 0
    return path


@pytest.fixture
def session(run, monkeypatch):
    """Lines of a pipe → (exit code, stdout, stderr), and how often a model was loaded."""
    load, loads = ask_session.load_model, []
    monkeypatch.setattr(ask_session, "load_model", lambda *args: loads.append(1) or load(*args))

    def session(*argv, lines: str, stdin: type = io.StringIO):
        monkeypatch.setattr(sys, "stdin", stdin(lines))
        return run("ask", "--interactive", *SHORT, *argv)

    session.loads = loads
    return session


def test_lines_of_a_pipe_are_answered_as_single_questions_are(session, run, cache, photos):
    """The answers of `ask`, from one model that is loaded once; an id, a whole path, a search, a part of the tokens."""
    ask = ("ask", "--cache", cache, *SHORT, "--json", QUESTION)
    expected = [
        json.loads(run(*ask, "--id", "a.png")[1]),
        json.loads(run(*ask, "--id", "beach/z.jpg", "--k", 2)[1]),
        json.loads(run(*ask, "--search", "dogs", "--top", 2, "--k", 2)[1]),
    ]
    lines = f"""/image a.png
        {QUESTION}

        /k 2
        /image {photos / "beach/z.jpg"}
        {QUESTION}
        /search dogs
        {QUESTION}
        /quit
        never asked"""
    code, out, err = session("--cache", cache, "--top", 2, "--json", lines=lines)
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(session.loads) == 1, err
    assert [hit["id"] for hit in told.pop(2)["hits"]] == expected[2]["images"]
    assert [row["answer"] for row in told] == [row["answer"] for row in expected]
    assert [row["k"] for row in told] == [4, 2, 2] and told[0]["images"] == ["a.png"]
    code, out, _ = session("--cache", cache, "--id", "a.png", lines=QUESTION)  # the input may just end
    assert (code, out.strip()) == (0, expected[0]["answer"])


def test_a_line_that_fails_is_reported_and_the_next_one_is_read(session, cache, photos, tmp_path):
    """A mistyped name must not cost the minutes in which the model was loaded; what was chosen before stays."""
    lines = f"""{QUESTION}
        /image a.png
        /image nowhere.png
        /image
        /k 9
        /k two
        /sarch dogs
        /search
        /image {photos / "text.jpg"}
        /help
        {QUESTION}"""
    code, out, err = session("--cache", cache, lines=lines)
    errors = [line for line in err.splitlines() if line.startswith("fwd2bot: error: ")]
    assert code == 0 and len(session.loads) == 1
    for line, said in zip(
        errors,
        (
            "No image is chosen",
            "no id 'nowhere.png'",
            "/image takes a name",
            "from 1 to 4, not '9'",
            "not 'two'",
            "There is no command /sarch",
            "/search takes a name",
            "not a picture",
        ),
        strict=True,
    ):
        assert said in line
    assert "/image ID|PATH" in out and len(out.splitlines()) == len(ask_session.COMMANDS.splitlines()) + 1


def test_files_and_summaries_without_a_cache(session, run, checkpoint, photos, stored):
    """Neither a cache nor LanceDB is needed to ask about files, or about one file of summaries."""
    one = ("ask", "--model", checkpoint, *SHORT, "--json", QUESTION)
    expected = [json.loads(run(*one, "--image", photos / name)[1])["answer"] for name in ("a.png", "b.png")]
    lines = f"/image {photos / 'b.png'}\n{QUESTION}\n/search dogs\n"
    code, out, err = session("--model", checkpoint, "--image", photos / "a.png", lines=f"{QUESTION}\n{lines}")
    assert (code, answers(out)) == (0, expected) and "/search needs a cache" in err
    lines = f"/image b.png\n{QUESTION}\n/image {photos / 'a.png'}\n{QUESTION}"
    code, out, _ = session("--model", checkpoint, "--summaries", stored, lines=lines)
    assert (code, answers(out)) == (0, expected[::-1])


def answers(out: str) -> list[str]:
    return [line.strip() for line in out.splitlines()]


def test_several_images_and_the_base_beside(session, run, checkpoint, photos):
    """--each and --dense do what they do for one question."""
    images = ("--model", checkpoint, "--image", photos / "a.png", photos / "b.png", "--each", "--dense")
    expected = run("ask", *SHORT, *images, QUESTION)[1]
    assert session(*images, lines=QUESTION)[:2] == (0, expected)


def test_usage(run, checkpoint, cache, photos):
    for argv, said in (
        (("--model", checkpoint, QUESTION), "leave out the question"),
        ((), "--model is missing"),
        (("--cache", cache, "--image", photos / "a.png"), "at most one"),
        (("--model", checkpoint, "--id", "a.png"), "--id goes with"),
        (("--cache", cache, "--id", "a.png", "--search", "dogs"), "without --id"),
        (("--cache", cache, "--dense"), "--dense goes with"),
    ):
        code, _, err = run("ask", "--interactive", *argv)
        assert code == 2 and said in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_ends_an_answer_first(session, cache, monkeypatch):
    """On a terminal one Ctrl-C ends a long answer and not the session; the next one, at the prompt, ends it."""
    typed = iter(["/image a.png", QUESTION, "/k 2", KeyboardInterrupt])

    def typing(prompt: str) -> str:
        line = next(typed)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(ask_session.Session, "question", interrupted)
    code, out, err = session("--cache", cache, lines="", stdin=Terminal)
    assert (code, out) == (130, "") and "interrupted; Ctrl-D ends" in err and err.endswith("fwd2bot: interrupted\n")


def interrupted(*args) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", ["ctrl-d", "ctrl-c"])
def test_on_a_terminal(checkpoint, photos, end):
    """A real terminal: a prompt, an answer, and an end without a traceback."""
    own, theirs = pty.openpty()
    argv = [sys.executable, "-m", "llava_fwd2bot", "ask", "--interactive", "--model", str(checkpoint), *SHORT]
    process = subprocess.Popen([*argv, "--image", str(photos / "a.png")], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = read_until(own, "ask: ")
    os.write(own, f"{QUESTION}\n".encode())
    shown += read_until(own, "ask: ")
    time.sleep(0.5)  # Python misses a signal between its prompt and its read
    os.write(own, b"\x04") if end == "ctrl-d" else process.send_signal(signal.SIGINT)
    assert process.wait(60) == (0 if end == "ctrl-d" else 130)
    shown += read_until(own, None)
    os.close(own)
    assert "Traceback" not in shown and "/help" in shown
    assert len(shown.split(QUESTION)[1].splitlines()[1].split()) > 1  # the answer


def read_until(terminal: int, text: str | None) -> str:
    """What a terminal shows up to a text, or to its end."""
    shown, start = "", time.monotonic()
    while text is None or text not in shown:
        assert time.monotonic() - start < 120, shown
        try:
            shown += os.read(terminal, 1024).decode()
        except OSError:  # the other side is closed
            break
    return shown
