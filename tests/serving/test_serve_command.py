"""`fwd2bot serve`: what is wrong is told before a model is loaded; a signal ends it after its answers."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import pytest
from server_toys import *  # noqa: F403
from server_toys import QUESTION, asking, httpx


def test_a_port_in_use(run, checkpoint):
    """Told at once, with what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--model", checkpoint, "--port", port)
    assert code == 1 and f"Port {port} of 127.0.0.1 is in use" in err and "--port" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "a bearer token is needed"),
        (("--host", "no.such.name.invalid"), "a bearer token is needed"),
        (("--token-file", "nowhere"), "No such file"),
        (("--cache", "nowhere.cache"), "There is no such cache"),
        (("--create",), "--create goes with --cache"),
        (("--port", "70000"), "at most 65,535"),
        (("--max-images", "0"), "at least 1"),
    ],
)
def test_what_is_wrong_is_told(run, checkpoint, monkeypatch, tmp_path, words, told):
    """In a line, by its option."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FWD2BOT_TOKEN", raising=False)
    code, _, err = run("serve", "--model", checkpoint, "--port", 0, *words)
    assert code in (1, 2) and told in err


def test_a_token_that_is_none(run, checkpoint, monkeypatch, tmp_path):
    """A file that was cut would let in whoever sends nothing."""
    (tmp_path / "token").write_text(" \n")
    code, _, err = run("serve", "--model", checkpoint, "--port", 0, "--token-file", tmp_path / "token")
    assert code == 1 and "at least 8 characters" in err


def test_a_cache_of_another_model(run, checkpoint, cached, tmp_path):
    """Its summaries would be read as noise."""
    import shutil

    shutil.copytree(checkpoint, tmp_path / "other")
    text = (tmp_path / "other/fwd2bot_config.json").read_text()
    (tmp_path / "other/fwd2bot_config.json").write_text(
        text.replace('"temperature": 0.07', '"temperature": 0.08') + " "
    )
    code, _, err = run("serve", "--model", tmp_path / "other", "--cache", cached, "--port", 0)
    assert code == 1 and "another model" in err


def test_a_signal_ends_it_after_its_answers(checkpoint, tmp_path):
    """The real command, with a cache that it makes: the stream that runs at SIGTERM comes to its end."""
    command = [sys.executable, "-m", "llava_fwd2bot", "serve", "--model", checkpoint, "--port", "0", "--device", "cpu"]
    command += ["--cache", tmp_path / "new.cache", "--create"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not (lines and "serving" in lines[-1]):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        url = re.search(r"http://\S+", lines[-1])[0]
        assert httpx.get(f"{url}/health").json()["images"] == {"new.cache": 0}
        body = {"messages": asking(QUESTION), "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            read = response.iter_lines()
            next(read)
            process.send_signal(signal.SIGTERM)
            assert [line for line in read if line][-1] == "data: [DONE]"
        process.wait(60)
        assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
