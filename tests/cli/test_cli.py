"""The command line on a toy checkpoint: usage, errors, info, and what all commands share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from cli_fixtures import QUESTION
from conftest import DENSE
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import llava_fwd2bot.checkpoint.load
import llava_fwd2bot.cli.info as cli
from llava_fwd2bot.cli.main import main


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_is_quick(argv):
    """Waiting seconds for torch to hear of an option's name is what makes people stop reading help."""
    code = (
        "import sys; from llava_fwd2bot.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert "fwd2bot" in done.stdout
    loaded = set(done.stderr.split())
    assert "llava_fwd2bot.cli.main" in loaded and not loaded & {"torch", "transformers", "numpy", "PIL", "safetensors"}


def test_usage_errors_give_2(run, checkpoint, photos):
    """Scripts tell a wrong call from failed work by the exit code."""
    ask = ("ask", "--model", checkpoint)
    for argv in (
        (),
        ("fly",),
        ("info",),
        (*ask, QUESTION),
        (*ask, "--image", photos / "a.png"),
        (*ask, "--image", photos / "a.png", photos / "b.png"),
        (*ask, "--image", photos / "a.png", "--k", 0, QUESTION),
        (*ask, "--image", photos / "a.png", "--temperature", -1, QUESTION),
        (*ask, "--image", photos / "a.png", "--temperature", "nan", QUESTION),
        (*ask, "--image", photos / "a.png", "--load-4bit", "--load-8bit", QUESTION),
        (*ask, "--summaries", "s.safetensors", QUESTION),
        (*ask, "--image", photos / "a.png", "--id", "a.png", QUESTION),
        ("compress", "--model", checkpoint, "--images", photos),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, "") and "usage: fwd2bot" in err, argv


@pytest.mark.parametrize(
    "error", [ValueError("bad"), OSError(28, "No space left", "/x"), ImportError("bad"), FileNotFoundError("bad")]
)
def test_errors_are_one_line_and_give_1(run, checkpoint, monkeypatch, error):
    """A user's mistake is told in a sentence; FWD2BOT_TRACEBACK=1 is for whoever has to find out where."""

    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "main", fail)
    code, out, err = run("info", checkpoint)
    said = "No space left: /x" if error.args[0] == 28 else "bad"
    assert (code, out, err) == (1, "", f"fwd2bot: error: {said}\n")
    monkeypatch.setenv("FWD2BOT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["info", str(checkpoint)])


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize(
    "error",
    [KeyError("bug"), RuntimeError("bug"), AttributeError("bug"), TypeError("bug\n  at"), Panic("bug"), OSError()],
)
def test_an_unexpected_error_is_one_line(run, checkpoint, monkeypatch, error):
    """A fault of the program must not look like the user's, nor bury its reason under fifty lines of traceback."""

    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "main", fail)
    code, out, err = run("info", checkpoint)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith(f"fwd2bot: error: {type(error).__name__}") and ("bug" in err) == bool(error.args)
    assert "a fault of fwd2bot" in err and "FWD2BOT_TRACEBACK=1" in err
    monkeypatch.setenv("FWD2BOT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["info", str(checkpoint)])


def test_what_a_program_says_as_it_exits_is_told(run, checkpoint, monkeypatch):
    """`sys.exit("reason")`, as LLaVA's programs have it, must not become an exit code alone."""
    monkeypatch.setattr(cli, "main", lambda argv: sys.exit("the reason"))
    assert run("info", checkpoint) == (1, "", "fwd2bot: error: the reason\n")


def test_ctrl_c_gives_130(run, checkpoint, monkeypatch):
    """The shell's own convention, so that a loop around the command stops too."""

    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", stop)
    code, out, _ = run("info", checkpoint)
    assert (code, out) == (130, "")


def test_no_checkpoint_there(run, tmp_path, photos):
    """The commonest mistake of all; also the base instead of the checkpoint."""
    for argv in (("info", tmp_path), ("ask", "--model", tmp_path, "--image", photos / "a.png", QUESTION)):
        code, out, err = run(*argv)
        assert (code, out) == (1, "") and err.startswith("fwd2bot: error: There is no Fwd2Bot checkpoint here")


def test_a_mistyped_folder_that_looks_like_a_hub_name(run, monkeypatch):
    """`runs/chekpoint` is a possible name on the hub, whose own words do not say that no such folder is here."""

    def offline(*args, **kwargs):
        raise FileNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    code, _, err = run("info", "runs/chekpoint")
    assert code == 1 and "There is no such folder here" in err and "the hub cannot be reached" in err
    assert err.count("runs/chekpoint") == 1  # it was told twice, and so was what is missing


def test_a_base_that_is_nowhere_is_named(run, checkpoint, llava_data, photos, tmp_path):
    """transformers said that it could not connect to the hub, and not which model it was about."""
    data = ("--data_path", llava_data["data"], "--output_dir", tmp_path / "m", "--fwd2bot", 4)
    ask = ("ask", "--model", checkpoint, "--base", "nowhere", "--image", photos / "a.png", "x?")
    convert = ("convert", checkpoint, "--base", "nowhere", "--output", tmp_path / "c")
    for argv in (("train", "--model_name_or_path", "nowhere", *data), ask, convert):
        code, _, err = run(*argv)
        assert code == 1 and "There is no such folder here, and the hub did not give it either" in err, err
        assert err.endswith(": nowhere\n") and len(err.splitlines()) == 1
    assert not (tmp_path / "c").exists()
    code, _, err = run("train", "--model_name_or_path", photos, *data)  # spoke of processing classes
    assert code == 1 and f"{photos} is not the folder of a model: it has no config.json." in err


def test_a_device_that_is_not_there(run, checkpoint, photos):
    """torch's own words for this are an AssertionError."""
    for device in ("cuda:99", "toaster", "meta", "xpu", "mps"):
        code, _, err = run("ask", "--model", checkpoint, "--image", photos / "a.png", "--device", device, QUESTION)
        assert code == 1 and f"--device {device}" in err


def test_train_gets_its_arguments_untouched(run, monkeypatch):
    """Its options are LLaVA's: argparse here must neither read nor abbreviate any; --help-all is their own help."""
    seen = []
    monkeypatch.setattr("llava_fwd2bot.training.command.train", lambda argv: seen.append(argv))
    assert run("train", "--fwd2bot", 4, "--version", "v1", "--help-all")[0] == 0
    assert seen == [["--fwd2bot", "4", "--version", "v1", "--help"]]


def test_train_help_and_errors(run, tmp_path):
    """The training parser's own help, and its errors in the same form as all others."""
    code, out, _ = run("train", "--help")
    assert code == 0 and "usage: fwd2bot train" in out and "--mm_projector_lr" in out
    code, out, err = run("train", "--output_dir", tmp_path / "out")
    assert (code, out) == (1, "") and "fwd2bot: error: --model_name_or_path is missing" in err


# ---------------------------------------------------------------------- info
def test_info_loads_no_model(run, checkpoint, own_base, monkeypatch):
    """It must answer at once, on a laptop, for a checkpoint of any size."""

    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(llava_fwd2bot.checkpoint.load, "open_checkpoint", never)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", never)
    monkeypatch.setattr("safetensors.torch.load_file", never)
    monkeypatch.setattr("llava_fwd2bot.checkpoint.read.load_file", never)
    code, out, _ = run("info", checkpoint, "--json")
    info = json.loads(out)
    assert code == 0
    assert info["settings"]["num_summary_tokens"] == {
        "value": 4,
        "help": "k: how many summary tokens an image is compressed into.",
        "source": "paper: 16 and 32",
    }
    assert info["base"]["found"] == str(own_base) and info["base"]["hidden_size"] == 64
    assert info["summary"] == {"tokens": 4, "dim": 64, "bytes_float16": 4 * 64 * 2}
    assert info["dense"] == {"tokens": DENSE, "dim": 64, "bytes_float16": DENSE * 64 * 2}
    tensors = {name: load_file(checkpoint / name) for name in info["files"]}
    assert set(tensors) == {f"{s}/adapter_model.safetensors" for s in ("compress", "answer")} | {"fwd2bot.safetensors"}
    for name, file in info["files"].items():
        assert file["trained_parameters"] == sum(x.numel() for x in tensors[name].values())
        assert file["bytes"] == (checkpoint / name).stat().st_size
    assert info["trained_parameters"] == sum(file["trained_parameters"] for file in info["files"].values())

    code, out, _ = run("info", checkpoint, "--verbose")
    assert code == 0 and "512 bytes" in out and "num_summary_tokens = 4" in out and "[paper: 16 and 32]" in out


def test_info_says_whether_the_base_is_here(run, checkpoint, tmp_path, monkeypatch):
    """One asks what a checkpoint needs exactly when its base, a folder or a hub name, is missing."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    saved = json.loads((copy / "fwd2bot_config.json").read_text())
    cached = {"nobody/here": str(tmp_path / "snapshot" / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: cached.get(name))
    for name, relative, found in (
        ("/gone/llava", "../gone", None),
        ("nobody/there", None, None),
        ("nobody/here", None, str(tmp_path / "snapshot")),
    ):
        saved["base"].update(name_or_path=name, relative_path=relative)
        (copy / "fwd2bot_config.json").write_text(json.dumps(saved))
        code, out, _ = run("info", copy, "--json")
        assert code == 0 and json.loads(out)["base"]["found"] == found
        assert ("not on this machine" in run("info", copy)[1]) == (found is None)


def test_info_is_short(run, checkpoint):
    """What one looks for stands in a dozen lines; settings with their sources come with --verbose."""
    code, out, _ = run("info", checkpoint)
    assert code == 0 and len(out.splitlines()) <= 12 and "4 x 64 = 512 bytes in float16" in out
    assert "nested_k            null" in out and "temperature_init" not in out
    verbose = run("info", checkpoint, "--verbose")[1]
    assert "temperature_init = 0.07" in verbose and "compress/adapter_model.safetensors" in verbose


def test_info_of_a_cache(run, checkpoint, photos, tmp_path):
    """A cache is as unreadable to its owner as a checkpoint."""
    pytest.importorskip("lancedb")
    cache = tmp_path / "photos.cache"
    assert (
        run(
            "compress",
            "--model",
            checkpoint,
            "--images",
            photos,
            "--cache",
            cache,
            "--codec",
            "float16",
            "--device",
            "cpu",
        )[0]
        == 0
    )
    code, out, _ = run("info", cache)
    assert code == 0 and len(out.splitlines()) <= 12
    assert (
        "5, " in out and "2 files skipped" in out and "4 x 64 as float16: 512 bytes" in out and str(checkpoint) in out
    )
    found = json.loads(run("info", cache, "--json")[1])
    assert found["settings"]["k"] == 4 and found["stats"]["rows"] == 5


def test_smol_llava_is_a_name_for_every_command(run):
    """Where it cannot be used it is refused at once, with what to use: the hub is asked for it by none."""
    for argv, message in (
        (
            ("llava", "train", "--model_name_or_path", "smol-llava"),
            "use `fwd2bot train --model_name_or_path smol-llava`",
        ),
        (("llava", "eval", "model_vqa", "--model-path=smol-llava"), "use `fwd2bot eval answer --model smol-llava`"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (1, "") and message in err


def test_llava_help_says_what_is_added(run):
    """Whoever knows LLaVA's arguments looks for the few that are ours."""
    code, out, _ = run("llava", "train", "--help")
    assert code == 0 and "what Fwd2Bot adds" in out and "--fwd2bot_caption_data" in out
    code, out, _ = run("llava", "eval", "--help")
    assert code == 0 and "Fwd2Bot adds" in out and "--from-cache" in out
