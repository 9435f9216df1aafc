"""`fwd2bot ask`, about images and from stored summaries."""

from __future__ import annotations

import json

import pytest
import torch
from cli_fixtures import QUESTION, SHORT, metadata
from safetensors.torch import load_file, save_file

import llava_fwd2bot.checkpoint.load
import llava_fwd2bot.cli.main as cli
from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.hosts.llava import Fwd2BotLlava
from llava_fwd2bot.processing.images import open_image
from llava_fwd2bot.training.data import ConversationFormatter


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
    load = llava_fwd2bot.checkpoint.load.load_fwd2bot

    def chatty(*args, **kwargs):
        print("===BUG REPORT===")
        return load(*args, **kwargs)

    monkeypatch.setattr(llava_fwd2bot.checkpoint.load, "load_fwd2bot", chatty)
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
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the model was loaded first"))
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
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the model was loaded first"))
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
    load = llava_fwd2bot.checkpoint.load.load_fwd2bot
    monkeypatch.setattr(
        llava_fwd2bot.checkpoint.load,
        "load_fwd2bot",
        lambda path, base, **kw: seen.append((base, kw)) or load(path, base, **kw),
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
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the model was loaded first"))
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
