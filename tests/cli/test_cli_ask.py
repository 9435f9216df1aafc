"""`fwd2bot ask`, about images and from stored summaries."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from cli_fixtures import QUESTION, SHORT, metadata
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_fwd2bot.checkpoint.load
import llava_fwd2bot.cli.ask
from llava_fwd2bot import answer, load_fwd2bot
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
    monkeypatch.setattr(llava_fwd2bot.cli.ask, "load_model", lambda *args: pytest.fail("the model was loaded first"))
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
    module = import_module(f"llava_fwd2bot.cli.{command}")
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("the model was loaded first"))
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
        found = json.loads(out)
        assert (code, found["answer"], found["images"], found["k"]) == (0, expected, [name], k or 4)
    assert json.loads(run(*ask, "--summaries", stored, "--id", "a.png", "--id", "b.png")[1])["answer"] == both


def test_errors_of_stored_summaries(run, checkpoint, stored, tmp_path, monkeypatch):
    """Each says what is wrong with the file or the id, and what to try, before the model is loaded."""
    monkeypatch.setattr(llava_fwd2bot.cli.ask, "load_model", lambda *args: pytest.fail("the model was loaded first"))
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


# ---------------------------------------------------------------------- several images, the base, other models
def test_one_answer_for_each_image(run, checkpoint, photos):
    """Several images are one question about all, which is said; --each asks about each by itself."""
    a, b = photos / "a.png", photos / "b.png"
    ask = ("ask", "--model", checkpoint, *SHORT)
    one = [json.loads(run(*ask, "--image", name, QUESTION, "--json")[1]) for name in (a, b)]
    code, out, err = run(*ask, "--each", "--image", a, b, QUESTION)
    assert (code, err) == (0, "") and out.splitlines() == [f"{x['images'][0]}: {x['answer']}" for x in one]
    each = json.loads(run(*ask, "--each", "--image", a, b, QUESTION, "--json")[1])["answers"]
    assert [x["answer"] for x in each] == [x["answer"] for x in one] and [x["images"] for x in each] == [
        [str(a)],
        [str(b)],
    ]
    assert "one question about all 2 images; with --each" in run(*ask, "--image", a, b, QUESTION)[2]


def test_the_bases_answer_beside_it(run, checkpoint, own_base, photos):
    """What the summary costs is seen by comparing; the base's answer must be the base's, from all dense tokens."""
    ask = ("ask", "--image", photos / "a.png", QUESTION, *SHORT)
    base = json.loads(run(*ask, "--model", own_base, "--json")[1])
    both = json.loads(run(*ask, "--model", checkpoint, "--dense", "--json")[1])
    assert both["dense"] == base["answer"] != both["answer"] and base["k"] is None
    code, out, _ = run(*ask, "--model", checkpoint, "--dense")
    assert code == 0
    assert out.splitlines() == [f"4 summary tokens: {both['answer']}", f"dense tokens: {both['dense']}"]


def test_a_plain_lora_run_can_be_asked(run, own_base, processor, photos, tmp_path):
    """`fwd2bot train` without the flag writes an adapter, whose answer nothing else here could show."""
    base = LlavaForConditionalGeneration.from_pretrained(own_base)
    targets = r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    plain = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    plain.save_pretrained(tmp_path / "plain")
    ask = ("ask", "--image", photos / "a.png", QUESTION, *SHORT)
    code, out, err = run(*ask, "--model", tmp_path / "plain", "--json")
    assert code == 0 and "has no Fwd2Bot: it answers from all dense tokens" in err
    said = json.loads(out)["answer"]
    assert said == answer(plain.eval(), processor, QUESTION, photos / "a.png", max_new_tokens=12)
    assert said != json.loads(run(*ask, "--model", own_base, "--json")[1])["answer"]
    for option in (("--k", 2), ("--dense",)):
        code, out, err = run(*ask, "--model", tmp_path / "plain", *option)
        assert (code, out) == (1, "") and f"leave out {option[0]}" in err
    (tmp_path / "plain" / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base"}')
    code, _, err = run(*ask, "--model", tmp_path / "plain")
    assert code == 1 and "The base of" in err and "/gone/base" in err


def test_questions_and_images_that_are_none(run, checkpoint, photos):
    """An empty question has an answer that means nothing; a URL is no file; a long question is no file name."""
    ask = ("ask", "--model", checkpoint, *SHORT, "--image", photos / "a.png")
    for question in ("", "  ", "<image>"):
        code, out, err = run(*ask, question)
        assert (code, out) == (2, "") and "the question is empty" in err
    code, _, err = run("ask", "--model", checkpoint, QUESTION, "--image", "https://example.org/a.png")
    assert code == 1 and "https://example.org/a.png: URLs are not fetched" in err
    assert run(*ask, "what " * 100)[0] == 0


def test_k_that_was_not_trained(run, checkpoint, photos):
    """The answer is given, with a warning of one line."""
    code, out, err = run("ask", "--model", checkpoint, "--image", photos / "a.png", QUESTION, *SHORT, "--k", 3)
    assert code == 0 and out.strip()
    assert err == "fwd2bot: warning: k = 3 was not trained: this model was trained with k = 4.\n"


def test_search_names_what_went_into_the_prompt(run, checkpoint, photos, tmp_path):
    """Whoever reads the answer must know which images it is about."""
    pytest.importorskip("lancedb")
    cache = tmp_path / "c.cache"
    assert run("compress", "--model", checkpoint, "--images", photos, "--cache", cache, "--device", "cpu")[0] == 0
    code, out, err = run("ask", "--cache", cache, "--search", "a dog", "--top", 2, QUESTION, "--json", *SHORT)
    names = json.loads(out)["images"]
    assert code == 0 and len(names) == 2 and f"found for 'a dog': {', '.join(names)}" in err
