"""What a user sees of pipes, warnings, libraries and misspelt names."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

import llava_fwd2bot.cli.info
from llava_fwd2bot.cli.console import plain_output
from llava_fwd2bot.cli.main import COMMANDS


def fwd2bot(*argv, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "llava_fwd2bot", *argv], env=environment, **options)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_closed_pipe_is_quiet(buffered):
    """`fwd2bot … | head -1` is how people look at output; `Exception ignored … BrokenPipeError` helps nobody."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        # unbuffered, argparse itself passes over what it cannot write of its help
        argv = ["info", "smol-llava"] if buffered else ["--help"]
        done = fwd2bot(*argv, stdout=writing, stderr=subprocess.PIPE, env={"PYTHONUNBUFFERED": buffered})
        assert (done.returncode, done.stderr) == (141, b"")
        done = fwd2bot("info", "/nowhere/at/all", stdout=subprocess.PIPE, stderr=writing)
        assert (done.returncode, done.stdout) == (1, b"")
    finally:
        os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_an_error():
    """Output that was not written must not give exit code 0."""
    with open("/dev/full", "w") as full:
        done = fwd2bot("--help", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr == b"fwd2bot: error: No space left on device\n"


def test_what_stdout_cannot_encode_is_escaped():
    """A file's name may hold any bytes, and a terminal any encoding: neither is an error."""
    done = fwd2bot("--help", capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"report, \\u2026" in done.stdout


def test_warnings(run, checkpoint, monkeypatch):
    """Ours are one line without a source line, each once; a library's show with FWD2BOT_LOG=debug alone."""

    def warn(argv):
        for _ in range(2):
            warnings.warn_explicit("ours\n  is this", UserWarning, llava_fwd2bot.cli.info.__file__, 1)
            warnings.warn_explicit("a library's", UserWarning, "/lib/torch/x.py", 7)

    monkeypatch.setattr(llava_fwd2bot.cli.info, "main", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("info", checkpoint)[2] == "fwd2bot: warning: ours is this\n"
        monkeypatch.setenv("FWD2BOT_LOG", "debug")
        assert "debug: /lib/torch/x.py:7: UserWarning: a library's\n" in run("info", checkpoint)[2]


def test_what_was_there_before_comes_back():
    """main() is called by scripts and tests as well: it must leave warnings and loggers as they were."""
    before, errors = warnings.showwarning, sys.stdout.errors
    with plain_output():
        assert warnings.showwarning is not before
    assert warnings.showwarning is before and sys.stdout.errors == errors


def test_libraries_are_quiet(run, checkpoint, photos):
    """With --load-8bit the answer was lost among 2,700 lines of bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    ask = ("ask", "--model", checkpoint, "--image", photos / "a.png", "what is it", "--device", "cpu", "--load-8bit")
    code, out, err = run(*ask, "--max-new-tokens", 3)
    assert code == 0 and len(out.splitlines()) == 1 and err == ""


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["aks"], "did you mean ask?"),
        (["ask", "--imge", "a.png", "what?"], "--imge: did you mean --image?"),
        (["compress", "--modle", "m"], "--modle: did you mean --model?"),
        (["search", "--cahce", "c", "dog"], "--cahce: did you mean --cache?"),
        (["cache", "verfy", "c"], "did you mean verify?"),
        (["cache", "stats", "c", "--jsn"], "--jsn: did you mean --json?"),
        (["info", "c", "--verbos"], "--verbos: did you mean --verbose?"),
        (["eval", "retreival"], "did you mean retrieval?"),
        (["eval", "retrieval", "--modle", "m"], "--modle: did you mean --model?"),
        (["convert", "c", "--bas=b"], "--bas: did you mean --base?"),
        (["llava", "trian"], "did you mean train?"),
        (["serch", "--cache", "c", "dog"], "did you mean search?\n"),  # and not: --cache: did you mean --help?
        (["--json", "search", "dog"], "the command must come first, and its options after it: fwd2bot search …\n"),
    ],
)
def test_the_nearest_name(run, argv, hint):
    """An unknown option names the one that was meant, also where a required one is missing for it."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and hint in err and err.startswith("usage: fwd2bot")


def test_the_nearest_argument_of_train(run):
    """`--imagefolder` among 200 arguments is not found by reading them."""
    code, out, err = run("train", "--imagefolder", "x", "--fwd2bto=2")
    assert (code, out) == (1, "") and "--imagefolder: did you mean --image_folder?" in err
    assert "--fwd2bto: did you mean --fwd2bot?" in err


def test_no_command_lists_the_commands(run):
    """The first thing that a newcomer types; the error named no command."""
    code, out, err = run()
    assert (code, out) == (2, "") and all(name in err for name in COMMANDS)
    assert "fwd2bot cache --help lists them" in run("cache")[2]


@pytest.mark.parametrize("argv", [["--help"], ["no-such-option", "--no-such-option"]])
def test_parsers_import_no_torch(argv):
    """Help and wrong usage of every command answer at once, without ten seconds of imports."""
    quick = [name for name in COMMANDS if name not in ("train", "llava")]  # transformers' own parser
    lines = [f"main({[name, *argv]!r})" for name in quick] + ['main(["eval", "score", "--help"])']
    code = "import sys\nfrom llava_fwd2bot.cli.main import main\n" + "\n".join(lines)
    code += "\nprint(*{'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["search", "--cache", "c", "dog", "--top", "99999999999"],
        ["cache", "vacuum", "c", "--older-than", "-1"],
        ["cache", "vacuum", "c", "--older-than", "nan"],
        ["cache", "vacuum", "c", "--older-than", "1e309"],
    ],
)
def test_numbers_that_libraries_do_not_take(run, argv):
    """They were an OverflowError from below, after the model was loaded."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and ", got '" in err


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, '{"architectures": 3}', "no JSON"])
def test_a_base_that_is_none(run, checkpoint, tmp_path, content):
    """A file in the place of a folder, or a config.json of another form, is told as that."""
    (tmp_path / "config.json").write_text(content)
    for base in (tmp_path, tmp_path / "config.json"):
        code, out, err = run("convert", checkpoint, "--base", base, "--output", tmp_path / "new")
        assert (code, out) == (1, "") and "fault of fwd2bot" not in err and str(tmp_path) in err
