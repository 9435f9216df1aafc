"""The command line, run in this process on a toy checkpoint: what it promises, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DENSE, settings, shake
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_fwd2bot.cli as cli
import llava_fwd2bot.load
from llava_fwd2bot import add_fwd2bot, load_fwd2bot
from llava_fwd2bot.cli import main
from llava_fwd2bot.data import ConversationFormatter
from llava_fwd2bot.hosts.llava import Fwd2BotLlava
from llava_fwd2bot.images import open_image
from llava_fwd2bot.mixin import Fwd2BotMixin

QUESTION = "how many dogs are there"
SHORT = ("--max-new-tokens", "12", "--device", "cpu")


@pytest.fixture(scope="session")
def own_base(base_dir, processor) -> Path:
    """The toy base, made to speak in printable words, so that answers can be compared as text."""
    base, vocabulary = LlavaForConditionalGeneration.from_pretrained(base_dir), processor.tokenizer.get_vocab()
    words = {at for word, at in vocabulary.items() if word.strip("▁").isalpha()}
    base.generation_config.suppress_tokens = sorted(set(range(base.config.text_config.vocab_size)) - words)
    path = base_dir.parent / "cli-base"
    base.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(own_base, processor) -> Path:
    model = shake(add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(own_base), settings(), processor))
    path = own_base.parent / "cli-checkpoint"
    model.save_pretrained(path, processor=processor)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven files that look like images, of which two cannot be read, one of them in a sub-folder; and a text."""
    folder = tmp_path / "photos"
    (folder / "beach").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("b.png", "a.png", "beach/a.png", "beach/z.jpg"):
        Image.fromarray(random.integers(0, 255, (40, 50, 3)).astype("uint8")).save(folder / name)
    Image.new("RGB", (1, 1), (9, 99, 9)).save(folder / "pixel.png")
    whole = (folder / "beach/z.jpg").read_bytes()
    (folder / "beach/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "notes.txt").write_text("not to be looked at")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """main() → (exit code, stdout, stderr); an error must not show a traceback."""
    monkeypatch.delenv("FWD2BOT_TRACEBACK", raising=False)

    def run(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def stored(run, checkpoint, photos, tmp_path) -> Path:
    """Summaries of `photos`, exact."""
    path = tmp_path / "stored.safetensors"
    command = ("compress", "--model", checkpoint, "--images", photos, "--output", path, "--store-dtype", "float32")
    # one at a time, as `ask` compresses: a batch may differ in the last bits
    assert run(*command, "--batch-size", 1, "--device", "cpu")[0] == 0
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------- all commands
@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_is_quick(argv):
    """Waiting seconds for torch to hear of an option's name is what makes people stop reading help."""
    code = "import sys; from llava_fwd2bot.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert "fwd2bot" in done.stdout
    loaded = set(done.stderr.split())
    assert "llava_fwd2bot.cli" in loaded and not loaded & {"torch", "transformers", "numpy", "PIL", "safetensors"}


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

    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_info", fail)
    code, out, err = run("info", checkpoint)
    said = "No space left: /x" if error.args[0] == 28 else "bad"
    assert (code, out, err) == (1, "", f"fwd2bot: error: {said}\n")
    monkeypatch.setenv("FWD2BOT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["info", str(checkpoint)])


def test_a_bug_keeps_its_traceback(checkpoint, monkeypatch):
    """What is our fault must not look like the user's."""
    monkeypatch.setattr(cli, "_info", lambda args: {}["bug"])
    with pytest.raises(KeyError):
        main(["info", str(checkpoint)])


def test_ctrl_c_gives_130(run, checkpoint, monkeypatch):
    """The shell's own convention, so that a loop around the command stops too."""

    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", stop)
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
    assert code == 1 and "no folder runs/chekpoint here" in err and "the hub cannot be reached" in err


def test_a_device_that_is_not_there(run, checkpoint, photos):
    """torch's own words for this are an AssertionError."""
    for device in ("cuda:99", "toaster"):
        code, _, err = run("ask", "--model", checkpoint, "--image", photos / "a.png", "--device", device, QUESTION)
        assert code == 1 and f"--device {device}" in err


def test_train_gets_its_arguments_untouched(run, monkeypatch):
    """Its options are LLaVA's: argparse here must neither read nor abbreviate any, --help included."""
    seen = []
    monkeypatch.setattr("llava_fwd2bot.train.train", lambda argv: seen.append(argv))
    assert run("train", "--fwd2bot", 4, "--version", "v1", "--help")[0] == 0
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

    monkeypatch.setattr(llava_fwd2bot.load, "open_checkpoint", never)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", never)
    monkeypatch.setattr("safetensors.torch.load_file", never)
    monkeypatch.setattr("llava_fwd2bot.checkpoint.load_file", never)
    code, out, _ = run("info", checkpoint, "--json")
    info = json.loads(out)
    assert code == 0
    assert info["settings"]["num_summary_tokens"] == {
        "value": 4,
        "help": "k: how many summary tokens an image is condensed into.",
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

    code, out, _ = run("info", checkpoint)
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


# ---------------------------------------------------------------------- ask
def test_ask_streams_what_the_model_says(run, checkpoint, photos):
    """stdout holds the answer and nothing else; --json holds the same answer in one object and nothing else."""
    loaded, processor = load_fwd2bot(checkpoint)
    prompt = ConversationFormatter(processor).prompt(QUESTION, 1)
    inputs = processor(text=prompt, images=[open_image(photos / "a.png")], return_tensors="pt")
    ids = loaded.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert expected.strip()

    ask = ("ask", "--model", checkpoint, "--image", photos / "a.png", QUESTION, *SHORT)
    code, out, _ = run(*ask)
    assert (code, out) == (0, expected + "\n")
    code, out, _ = run(*ask, "--json")
    answer = json.loads(out)
    assert code == 0 and answer.pop("seconds") > 0
    assert answer == {
        "question": QUESTION,
        "images": [str(photos / "a.png")],
        "k": 4,
        "answer": expected.strip(),
    }


def test_json_is_pure_whatever_libraries_print(run, checkpoint, photos, monkeypatch):
    """`fwd2bot ask --json | jq` breaks on a single line that some library prints."""
    load = llava_fwd2bot.load.load_fwd2bot

    def chatty(*args, **kwargs):
        print("===BUG REPORT===")
        return load(*args, **kwargs)

    monkeypatch.setattr(llava_fwd2bot.load, "load_fwd2bot", chatty)
    output = photos.parent / "s.safetensors"
    for command in (
        ("ask", "--image", photos / "a.png", QUESTION, "--max-new-tokens", 2),
        ("compress", "--images", photos, "--output", output),
    ):
        code, out, err = run(*command, "--model", checkpoint, "--json")
        assert code == 0 and isinstance(json.loads(out), dict) and "===BUG REPORT===" in err


def test_ask_about_several_images(run, checkpoint, photos):
    """Images go into the prompt in the order given; the question may stand before or after the files."""
    a, b = photos / "a.png", photos / "b.png"
    ask = ("ask", "--model", checkpoint, "--json", *SHORT)
    one = json.loads(run(*ask, "--image", a, b, QUESTION)[1])
    two = json.loads(run(*ask, QUESTION, "--image", a, "--image", b)[1])
    placed = json.loads(run(*ask, f"<image>\n<image>\n{QUESTION}", "--image", a, b)[1])
    assert one["images"] == [str(a), str(b)] and one["answer"] == two["answer"] == placed["answer"]
    code, out, err = run(*ask, "one <image> only", "--image", a, b)
    assert (code, out) == (1, "") and "the question holds 1 <image>" in err


def test_ask_begins_once(run, checkpoint, photos, stored, monkeypatch):
    """A chat template may write the BOS itself; a second one from the tokenizer is a prompt never seen in training."""
    seen, render = [], ConversationFormatter._render
    generate = Fwd2BotLlava.generate
    monkeypatch.setattr(
        Fwd2BotLlava, "generate", lambda self, **kw: seen.append(kw["input_ids"][0].tolist()) or generate(self, **kw)
    )
    ask = ("ask", "--model", checkpoint, QUESTION, *SHORT)
    for begin in ("", "<s>"):
        monkeypatch.setattr(ConversationFormatter, "_render", lambda *args, begin=begin: begin + render(*args))
        for source in (("--image", photos / "a.png"), ("--summaries", stored, "--id", "a.png")):
            assert run(*ask, *source)[0] == 0
    assert [ids.count(1) for ids in seen] == [1] * 4 and all(ids[0] == 1 for ids in seen)


def test_ask_samples_only_when_told(run, checkpoint, photos):
    """Temperature 0 is reproducible; above it the answers differ."""
    ask = ("ask", "--model", checkpoint, "--image", photos / "a.png", QUESTION, "--json", *SHORT)
    answers = [json.loads(run(*ask, "--temperature", t)[1])["answer"] for t in (0, 0, 50, 50)]
    assert answers[0] == answers[1] and len(set(answers)) == 3


def test_ask_with_a_bad_picture(run, checkpoint, photos, monkeypatch):
    """It is named, with the reason, before minutes are spent on loading a model."""
    monkeypatch.setattr(cli, "_load", lambda *args: pytest.fail("the model was loaded first"))
    for name, reason in (
        ("beach/truncated.jpg", "damaged or truncated"),
        ("text.jpg", "not a picture"),
        ("missing.png", "no such file"),
        ("beach", "is a folder"),
    ):
        code, out, err = run("ask", "--model", checkpoint, QUESTION, "--image", photos / name, "--json")
        assert (code, out) == (1, "") and err.startswith(f"fwd2bot: error: {photos / name}: {reason}")


def test_a_one_pixel_picture_is_a_picture(run, checkpoint, photos):
    """Image processors take a 1x1x3 array's axes for others than they are, if one lets them guess."""
    ask = ("ask", "--model", checkpoint, "--image", photos / "pixel.png", QUESTION, "--json", *SHORT)
    assert run(*ask)[0] == 0


@pytest.mark.parametrize("command", ["ask", "compress"])
def test_k_above_the_models(run, checkpoint, photos, tmp_path, monkeypatch, command):
    """Told before the model is loaded, with the largest k there is."""
    monkeypatch.setattr(cli, "_load", lambda *args: pytest.fail("the model was loaded first"))
    rest = {
        "ask": ("--image", photos / "a.png", QUESTION),
        "compress": ("--images", photos, "--output", tmp_path / "s.safetensors"),
    }[command]
    code, out, err = run(command, "--model", checkpoint, *rest, "--k", 5)
    assert (code, out) == (1, "") and "k = 4, got 5" in err
    assert not (tmp_path / "s.safetensors").exists()


def test_dtype_and_base_reach_the_loader(run, checkpoint, own_base, photos, monkeypatch):
    """Options that are read and then dropped are the hardest to notice."""
    seen = []
    load = llava_fwd2bot.load.load_fwd2bot
    monkeypatch.setattr(
        llava_fwd2bot.load, "load_fwd2bot", lambda path, base, **kw: seen.append((base, kw)) or load(path, base, **kw)
    )
    ask = ("ask", "--model", checkpoint, "--image", photos / "a.png", QUESTION, *SHORT)
    assert run(*ask, "--dtype", "bfloat16", "--base", own_base)[0] == 0
    assert run(*ask)[0] == 0
    assert seen == [(str(own_base), {"dtype": torch.bfloat16}), (None, {"dtype": "auto"})]


@pytest.mark.parametrize("width", ["--load-4bit", "--load-8bit"])
def test_quantised_loading(run, checkpoint, photos, width):
    """The same answer's form from a quantised model; in 4 bits as `fwd2bot train --bits 4` has it, NF4."""
    pytest.importorskip("bitsandbytes")
    code, out, _ = run("ask", "--model", checkpoint, "--image", photos / "a.png", QUESTION, width, "--json", *SHORT)
    assert code == 0 and json.loads(out)["answer"]


# ---------------------------------------------------------------------- compress
def test_compress_writes_what_compress_gives(run, checkpoint, photos, tmp_path):
    """The file is the interface to search and to ask: names, order, numbers and metadata are all promised."""
    output = tmp_path / "new" / "s.safetensors"
    code, out, err = run(
        "compress", "--model", checkpoint, "--images", photos, "--output", output, "--batch-size", 2, "--device", "cpu"
    )
    assert code == 0
    ids = ["a.png", "b.png", "beach/a.png", "beach/z.jpg", "pixel.png"]
    meta, tensors = metadata(output), load_file(output)
    assert json.loads(meta["ids"]) == ids and meta["k"] == "4"
    assert [entry["id"] for entry in json.loads(meta["skipped"])] == ["beach/truncated.jpg", "text.jpg"]
    assert meta["version"] == llava_fwd2bot.__version__ and len(meta["fingerprint"]) == 64
    assert {n: (x.dtype, list(x.shape)) for n, x in tensors.items()} == {
        "summary": (torch.float16, [5, 4, 64]),
        "embedding": (torch.float32, [5, 64]),
    }
    loaded, processor = load_fwd2bot(checkpoint)
    pixels = processor.image_processor(images=[open_image(photos / name) for name in ids], return_tensors="pt")
    with torch.no_grad():
        summary = loaded.compress(**pixels)
        torch.testing.assert_close(tensors["summary"].float(), summary, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tensors["embedding"], loaded.embed_image(summary=summary), rtol=1e-5, atol=1e-5)
    assert "5 images" in out and "2 skipped" in out
    assert f"{photos / 'text.jpg'}: not a picture" in err and f"{photos / 'beach/truncated.jpg'}: damaged" in err
    assert "image/s" in err  # the progress bar's rate
    assert [p.name for p in output.parent.iterdir()] == [output.name]  # nothing left beside it


def test_compress_k_is_a_prefix(run, checkpoint, photos, stored, tmp_path):
    """Fewer tokens cost less and are the first rows of the same summary."""
    output = tmp_path / "two.safetensors"
    code, out, _ = run(
        *("compress", "--model", checkpoint, "--images", photos, "--output", output, "--k", 2, "--json"),
        *("--store-dtype", "float32", "--device", "cpu"),
    )
    assert code == 0 and json.loads(out)["k"] == 2 and metadata(output)["k"] == "2"
    torch.testing.assert_close(load_file(output)["summary"], load_file(stored)["summary"][:, :2], rtol=1e-4, atol=1e-5)


def test_compress_json(run, checkpoint, photos, tmp_path):
    """One object on stdout, with the skipped images and why."""
    output = tmp_path / "s.safetensors"
    code, out, _ = run("compress", "--model", checkpoint, "--images", photos, "--output", output, "--json")
    done = json.loads(out)
    assert code == 0 and done["images"] == 5 and done["bytes"] == output.stat().st_size
    assert {entry["id"] for entry in done["skipped"]} == {"text.jpg", "beach/truncated.jpg"}
    assert all(entry["reason"] for entry in done["skipped"])


def test_compress_files_with_the_same_name(run, checkpoint, photos, tmp_path):
    """Files are known by name; two of one name by the path as given, a file given twice once, a missing one skipped."""
    a, z, again = photos / "a.png", photos / "beach/z.jpg", photos / "beach/a.png"
    output = tmp_path / "s.safetensors"
    code, out, err = run(
        *("compress", "--model", checkpoint, "--output", output, "--json"),
        *("--images", a, z, again, a, photos / "gone.png"),
    )
    assert code == 0 and json.loads(metadata(output)["ids"]) == [a.as_posix(), "z.jpg", again.as_posix()]
    assert [entry["id"] for entry in json.loads(out)["skipped"]] == ["gone.png"] and "gone.png: no such file" in err


def test_compress_max_pixels(run, checkpoint, photos, tmp_path):
    """A decompression bomb in a crawled folder costs its own summary and nothing else."""
    output = tmp_path / "s.safetensors"
    code, out, err = run(
        "compress", "--model", checkpoint, "--images", photos, "--output", output, "--max-pixels", 100, "--json"
    )
    assert code == 0 and json.loads(metadata(output)["ids"]) == ["pixel.png"]
    assert "40" in err and "over the limit of 100" in err


def test_compress_with_nothing_to_compress(run, checkpoint, photos, tmp_path):
    """No image at all is an error, and leaves no file that looks like a result."""
    output, empty = tmp_path / "s.safetensors", tmp_path / "empty"
    empty.mkdir()
    for images, said in (
        ((photos / "text.jpg",), "None of the 1 image(s) could be used"),
        ((photos / "text.jpg", photos / "missing.png"), "None of the 2"),
        ((empty,), "no image file in"),
    ):
        code, out, err = run("compress", "--model", checkpoint, "--images", *images, "--output", output)
        assert (code, out) == (1, "") and said in err.splitlines()[-1]
        assert not list(tmp_path.glob("*s.safetensors*"))


def test_compress_keeps_what_is_there(run, checkpoint, photos, stored, monkeypatch):
    """Hours of work are not overwritten by a repeated command; with --overwrite they are, and only by a whole file."""
    before = stored.read_bytes()
    command = ("compress", "--model", checkpoint, "--images", photos, "--output", stored)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_load", lambda *args: pytest.fail("the model was loaded first"))
        code, out, err = run(*command)
        assert (code, out) == (1, "") and "--overwrite" in err and stored.read_bytes() == before

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llava_fwd2bot.compress.save_file", full)
        code, out, err = run(*command, "--overwrite")
        assert (code, out) == (1, "") and "No space left on device" in err and stored.read_bytes() == before
        assert not [p for p in stored.parent.iterdir() if p.name.startswith(".")]
    assert run(*command, "--overwrite")[0] == 0
    assert load_file(stored)["summary"].dtype == torch.float16


def test_compress_checks_the_output_before_the_work(run, checkpoint, photos, tmp_path, monkeypatch):
    """An output that cannot be written is told in a second, not after the last image."""
    monkeypatch.setattr(cli, "_load", lambda *args: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("a regular file")
    for output in (tmp_path / "file" / "s.safetensors", tmp_path / "file" / "sub" / "s.safetensors", tmp_path):
        code, out, err = run("compress", "--model", checkpoint, "--images", photos, "--output", output)
        assert (code, out) == (1, "") and "--output" in err and str(output) in err


def test_compress_leaves_out_what_overflows(run, checkpoint, photos, tmp_path, monkeypatch):
    """An infinite summary on disk poisons every answer and every search from it, silently."""
    compress = Fwd2BotMixin.compress

    def large(self, pixel_values, **kwargs):
        summary = compress(self, pixel_values, **kwargs)
        summary[0] *= 1e6
        return summary

    monkeypatch.setattr(Fwd2BotMixin, "compress", large)
    output = tmp_path / "s.safetensors"
    command = ("compress", "--model", checkpoint, "--images", photos, "--output", output, "--device", "cpu")
    code, _, err = run(*command)
    assert code == 0 and "a.png: its summary overflows" in err
    assert json.loads(metadata(output)["ids"]) == ["b.png", "beach/a.png", "beach/z.jpg", "pixel.png"]
    assert torch.isfinite(load_file(output)["summary"]).all()
    assert run(*command, "--overwrite", "--store-dtype", "bfloat16")[0] == 0
    assert len(json.loads(metadata(output)["ids"])) == 5


# ---------------------------------------------------------------------- ask from stored summaries
@pytest.mark.parametrize("k", [None, 2])
def test_stored_summaries_answer_as_the_image_does(run, checkpoint, photos, stored, monkeypatch, k):
    """What the method promises: compress once, ask for ever. The vision tower must not run."""
    ask = ("ask", "--model", checkpoint, QUESTION, "--json", *SHORT, *(("--k", k) if k else ()))
    names = ["a.png", "beach/z.jpg", "pixel.png"]
    seen = [json.loads(run(*ask, "--image", photos / name)[1])["answer"] for name in names]
    both = json.loads(run(*ask, "--image", photos / "a.png", photos / "b.png")[1])["answer"]
    assert len(set(seen)) > 1
    if k:  # fewer tokens are another summary, so that --k is seen to do something
        all_tokens = [json.loads(run(*ask[:-2], "--image", photos / name)[1])["answer"] for name in names]
        assert all_tokens != seen
    monkeypatch.setattr(Fwd2BotLlava, "_dense_tokens", lambda *args, **kwargs: pytest.fail("the vision tower ran"))
    for name, expected in zip(names, seen, strict=True):
        code, out, _ = run(*ask, "--summaries", stored, "--id", name)
        answer = json.loads(out)
        assert (code, answer["answer"], answer["images"], answer["k"]) == (0, expected, [name], k or 4)
    assert json.loads(run(*ask, "--summaries", stored, "--id", "a.png", "--id", "b.png")[1])["answer"] == both


def test_errors_of_stored_summaries(run, checkpoint, stored, tmp_path, monkeypatch):
    """Each says what is wrong with the file or the id, and what to try, before the model is loaded."""
    monkeypatch.setattr(cli, "_load", lambda *args: pytest.fail("the model was loaded first"))
    tensors, meta = load_file(stored), metadata(stored)
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, metadata={**meta, "fingerprint": "0" * 64})
    foreign = tmp_path / "foreign.safetensors"
    save_file(tensors, foreign)
    short = tmp_path / "short.safetensors"
    save_file({**tensors, "summary": tensors["summary"][:, :2].contiguous()}, short, metadata={**meta, "k": "2"})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(stored.read_bytes()[:100])
    for path, name, k, said in (
        (stored, "beach/aa.png", 4, "Close ones: beach/a.png"),
        (stored, "elsewhere/z.jpg", 4, "Close ones: beach/z.jpg"),
        (stored, "text.jpg", 4, "was skipped"),
        (stored, "?", 4, "It has 5"),
        (other, "a.png", 4, "written with another model"),
        (foreign, "a.png", 4, "not written by `fwd2bot compress`"),
        (short, "a.png", 3, "holds 2 tokens per image, but --k asks for 3"),
        (broken, "a.png", 4, "cannot be read as safetensors"),
        (tmp_path / "none.safetensors", "a.png", 4, "no such file"),
    ):
        code, out, err = run("ask", "--model", checkpoint, QUESTION, "--summaries", path, "--id", name, "--k", k)
        assert (code, out) == (1, "") and err.startswith("fwd2bot: error: ") and said in err, err
