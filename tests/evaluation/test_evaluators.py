"""`fwd2bot eval` retrieval, captioning and answer: figures by hand, codecs, going on after a stop."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.evaluation.datasets import read_captioned
from llava_fwd2bot.evaluation.encode import Encoder


def test_retrieval_by_command(run, checkpoint, captioned):
    """For every k from one encoding; by both ways; killed and begun again, the same figures."""
    argv = [
        "eval",
        "retrieval",
        "--model",
        checkpoint,
        "--dataset",
        captioned / "own.jsonl",
        "--k",
        1,
        2,
        4,
        "--maxsim",
    ]
    argv += ["--work", captioned / "work", "--output", captioned / "result.json", "--device", "cpu"]
    code, out, err = run(*argv)
    assert code == 0, err
    result = json.loads((captioned / "result.json").read_text())
    assert [(row["k"], row["by"]) for row in result["rows"]] == [(k, by) for k in (1, 2, 4) for by in ("", "maxsim")]
    assert result["images"] == 6 and result["captions"] == 12 and result["versions"] and result["date"]
    assert all(len(row["per_item"]) == 12 for row in result["rows"])
    row = next(row for row in result["rows"] if (row["k"], row["by"]) == (4, ""))
    assert row["figures"]["t2i_r1"] == pytest.approx(sum(row["per_item"].values()) / 12)
    assert row["items_of_figure"]["i2t_r5"] == 6 and row["image_of_item"] == [i // 2 for i in range(12)]
    model, processor = load_fwd2bot(checkpoint)
    pixels = processor.image_processor([Image.open(captioned / "images" / "0.png")], return_tensors="pt")
    encoder = Encoder(model, processor, result["fingerprint"], captioned / "work")
    kept = encoder.file("images", encoder.digests([captioned / "images" / "0.png"]))
    torch.testing.assert_close(load_file(kept)["summary"].float(), model.compress(**pixels)[0], atol=1e-2, rtol=1e-2)
    for half in (captioned / "work").glob("texts-*"):
        half.unlink()
    times = {path: path.stat().st_mtime_ns for path in (captioned / "work").iterdir()}
    assert run(*argv, "--json")[0] == 0
    again = json.loads((captioned / "result.json").read_text())
    assert again["rows"] == result["rows"]
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())  # what was there was not made again
    assert run(*argv, "--k", 9)[2].count("--k must be from 1 to this model's k = 4, got 9") == 1


def test_another_model_does_not_take_what_is_kept(checkpoint, captioned):
    """Summaries of another model in the same folder would be silently wrong."""
    model, processor = load_fwd2bot(checkpoint)
    data = read_captioned(str(captioned / "own.jsonl"))
    files = set()
    for fingerprint in ("one", "other"):
        Encoder(model, processor, fingerprint, captioned / "work").images(data.paths)
        files |= set((captioned / "work").iterdir())
    assert len(files) == 2 * 6


def replaced(path, colour: str) -> None:
    """Another picture under the same name, of the same size in bytes and with the same time."""
    before = path.stat()
    Image.new("RGB", (40, 30), colour).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_replaced_picture_is_encoded_anew(checkpoint, captioned):
    """Bitmaps of one size have one number of bytes: the new picture was answered from the old one's summary."""
    model, processor = load_fwd2bot(checkpoint)
    path, work = captioned / "x.bmp", captioned / "work"
    Image.new("RGB", (40, 30), "red").save(path)
    encoder = Encoder(model, processor, "one", work)
    red = encoder.images([path])
    replaced(path, "blue")
    blue = encoder.images([path])
    assert not torch.equal(red, blue) and torch.equal(blue, Encoder(model, processor, "one").images([path]))
    path.rename(captioned / "y.bmp")  # and the same content is not encoded again, whatever its name
    assert torch.equal(Encoder(model, processor, "one", work).images([captioned / "y.bmp"]), blue)
    assert len(list(work.iterdir())) == 2


def test_a_picture_that_is_replaced_meanwhile_is_kept_as_what_it_was(checkpoint, captioned, monkeypatch):
    """Between hashing a file and decoding it another may take its place: a summary under the wrong hash."""
    model, processor = load_fwd2bot(checkpoint)
    path, work = captioned / "x.bmp", captioned / "work"
    Image.new("RGB", (40, 30), "red").save(path)
    encoder = Encoder(model, processor, "one", work)
    digests = encoder.digests
    monkeypatch.setattr(encoder, "digests", lambda paths: (digests(paths), replaced(path, "blue"))[0])
    blue = encoder.images([path])
    replaced(path, "red")
    red = Encoder(model, processor, "one", work).images([path])
    assert not torch.equal(red, blue) and torch.equal(red, Encoder(model, processor, "one").images([path]))


def test_what_another_preparation_left_is_not_taken(checkpoint, captioned):
    """The image processor is a file of the checkpoint's folder, which its fingerprint does not cover."""
    model, processor = load_fwd2bot(checkpoint)
    paths, work = read_captioned(str(captioned / "own.jsonl")).paths, captioned / "work"
    first = Encoder(model, processor, "one", work).images(paths)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    other = Encoder(model, processor, "one", work).images(paths)
    assert not torch.equal(first, other) and torch.equal(other, Encoder(model, processor, "one").images(paths))


def test_answers_about_a_replaced_picture_are_not_kept(run, checkpoint, captioned):
    """The encoding is one thing that is kept by a name; the answers file is another, and the captions' a third."""
    questions, answers, images = captioned / "q.jsonl", captioned / "a.jsonl", captioned / "images"
    Image.new("RGB", (40, 30), "red").save(images / "x.bmp")
    questions.write_text(
        json.dumps({"question_id": 1, "image": "x.bmp", "text": "a\u2028b?"}, ensure_ascii=False) + "\n"
    )
    argv = ["eval", "answer", "--model", checkpoint, "--questions", questions, "--images", images]
    argv += ["--answers", answers, "--work", captioned / "work", "--max-new-tokens", 6, "--device", "cpu"]
    assert run(*argv)[0] == 0 and run(*argv)[0] == 0
    written = answers.read_text()
    assert len(written.splitlines()) == 1 and json.loads(written)["prompt"] == "a\u2028b?"
    replaced(images / "x.bmp", "blue")
    code, _, err = run(*argv)
    assert code == 1 and "x.bmp has changed since question 1 was answered" in err and answers.read_text() == written

    (captioned / "one.jsonl").write_text(json.dumps({"image": "images/x.bmp", "captions": ["a picture"]}))
    argv = ["eval", "captioning", "--model", checkpoint, "--dataset", captioned / "one.jsonl", "--images", captioned]
    argv += ["--work", captioned / "work", "--max-new-tokens", 6, "--device", "cpu"]
    pytest.importorskip("pycocoevalcap")
    assert run(*argv)[0] == 0
    replaced(images / "x.bmp", "red")
    assert run(*argv)[0] == 0 and len(list((captioned / "work").glob("captions-*"))) == 2


def test_texts_come_back_in_their_order(checkpoint, captioned):
    """They are sorted by length for the pass."""
    model, processor = load_fwd2bot(checkpoint)
    texts = ["a very long caption of a red cat", "cat", "two dogs on a mat", "cat"]
    found = Encoder(model, processor, "x", None, batch_size=2).texts(texts)
    for text, summary in zip(texts, found, strict=True):
        ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(summary.float(), model.compress_text(ids)[0], atol=1e-2, rtol=1e-2)


def test_answers_go_on_where_they_were(run, checkpoint, captioned):
    """Cut off in the middle of a line, begun again: the same answers, none twice; as `ask` answers; the base's too."""
    questions, answers = captioned / "q.jsonl", captioned / "a.jsonl"
    asked = [{"question_id": i, "image": f"{i % 6}.png", "text": ("what is it?", "a dog?")[i % 2]} for i in range(9)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    argv = ["eval", "answer", "--model", checkpoint, "--questions", questions, "--images", captioned / "images"]
    argv += ["--answers", answers, "--work", captioned / "work", "--max-new-tokens", 6, "--device", "cpu"]
    code, _, err = run(*argv, "--k", 2)
    assert code == 0, err
    whole = answers.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert sorted(line["question_id"] for line in lines) == list(range(9)) and lines[0]["metadata"]["k"] == 2
    answers.write_text(whole[: len(whole) // 2])
    code, out, _ = run(*argv, "--k", 2, "--json")
    assert 0 < json.loads(out)["answered_before"] < 9
    assert sorted(answers.read_text().splitlines()) == sorted(whole.splitlines())
    first = next(line for line in lines if line["question_id"] == 0)
    picture = captioned / "images" / "0.png"
    out = run(
        "ask", "--model", checkpoint, "--image", picture, "what is it?", "--k", 2, "--max-new-tokens", 6, "--json"
    )[1]
    assert json.loads(out)["answer"] == first["text"]
    code, _, err = run(*argv, "--k", 4)
    assert code == 1 and f"{answers} was made with k = 2, not 4. Choose another file with --answers." in err
    assert "{" not in err  # two raw dicts stood here
    answers.unlink()
    assert run(*argv, "--from-base")[0] == 0
    dense = [json.loads(line) for line in answers.read_text().splitlines()]
    assert dense[0]["metadata"]["k"] == "dense" and {line["text"] for line in dense} != {line["text"] for line in lines}


def test_captions_are_scored_for_every_k_and_the_base(run, checkpoint, captioned):
    pytest.importorskip("pycocoevalcap")
    argv = ["eval", "captioning", "--model", checkpoint, "--dataset", captioned / "own.jsonl", "--with-base"]
    argv += ["--k", 1, 4, "--work", captioned / "work", "--output", captioned / "r.json", "--device", "cpu"]
    code, _, err = run(*argv, "--max-new-tokens", 8)
    assert code == 0, err
    result = json.loads((captioned / "r.json").read_text())
    assert [row["k"] for row in result["rows"]] == ["dense", 1, 4]
    assert all({"cider", "bleu4"} <= set(row["figures"]) for row in result["rows"])
    assert all(len(row["per_item"]) == 6 for row in result["rows"])
    from llava_fwd2bot.evaluation.answers import Answerer
    from llava_fwd2bot.evaluation.captioning import captioning

    model, processor = load_fwd2bot(checkpoint)  # under the name of its quantised kind: answers of its own
    encoder = Encoder(model, processor, f"{result['fingerprint']} 4bit", captioned / "work")
    data = read_captioned(str(captioned / "own.jsonl"))
    captioning(Answerer(encoder, 2), data, [4], captioned / "work", str(checkpoint))
    assert len(list((captioned / "work").glob("captions-own-*-k4.jsonl"))) == 2


def test_empty_captions_are_counted_and_named(run, checkpoint, captioned):
    """They are in the mean with nothing to show it; where there is none, the row is as it was."""
    pytest.importorskip("pycocoevalcap")
    argv = ["eval", "captioning", "--model", checkpoint, "--dataset", captioned / "own.jsonl", "--k", 4]
    argv += ["--work", captioned / "work", "--output", captioned / "r.json", "--device", "cpu", "--max-new-tokens", 3]
    assert run(*argv)[0] == 0
    kept = next((captioned / "work").glob("captions-*"))
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for empty in (0, 2):
        for line in lines:
            line["text"] = "" if line["question_id"] < empty else "a red picture"
        kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, out, err = run(*argv)
        assert code == 0 and "| k | scored by | CIDEr × 100 | BLEU-4 × 100 |" in out
        assert "n = 6 images, 12 captions" in out
        row = json.loads((captioned / "r.json").read_text())["rows"][0]
        assert row.get("empty") == (empty or None)
        told = "k=4: 2 of 6 captions are empty and are scored as such; the first: 0.png, 1.png"
        assert (told in err) == bool(empty)
    from llava_fwd2bot.evaluation.results import read_results

    assert read_results([captioned / "r.json"]).results[0].metric == "cider"


def test_what_captions_are_scored_by_is_looked_for_first(monkeypatch):
    """Hours of captioning came first."""
    from llava_fwd2bot.evaluation import metrics
    from llava_fwd2bot.evaluation.captioning import captioning

    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="SPICE needs Java"):
        captioning(None, None, [1], None, "m", spice=True)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ImportError, match=r"llava_fwd2bot\[eval\]"):
        captioning(None, None, [1], None, "m")


def test_a_codec_gives_what_a_cache_of_it_gives_back(run, checkpoint, captioned, tmp_path):
    """Retrieval and answers by --codec are those from decoded summaries; kept files are shared."""
    from llava_fwd2bot.cache.codecs import get_codec
    from llava_fwd2bot.evaluation.answers import Answerer
    from llava_fwd2bot.evaluation.results import read_results
    from llava_fwd2bot.processing.generate import from_summaries

    loaded, codec = load_fwd2bot(checkpoint), get_codec("int2")
    paths, work = read_captioned(str(captioned / "own.jsonl")).paths, captioned / "work"
    plain, coded = (Encoder(*loaded, "x", work, codec=c).images(paths) for c in (None, codec))
    assert torch.equal(coded, codec.decode(codec.encode(plain), plain.shape[2])) and len(list(work.iterdir())) == 6
    answerer = Answerer(Encoder(*loaded, "x", work, codec=codec), 6)
    (_, said), *_ = answerer(paths[:1], ["what is it?"], 2)
    prompt = answerer.formatter.prompt("what is it?")
    assert said == from_summaries(*loaded, [prompt], coded[:1, :2], max_new_tokens=6)[0]
    results = captioned / "results"
    argv = ["eval", "retrieval", "--model", checkpoint, "--dataset", captioned / "own.jsonl", "--work", work]
    for name in ("int2", "int8"):
        assert run(*argv, "--codec", name, "--device", "cpu", "--output", results / f"{name}.json")[0] == 0
    assert {r.model for r in read_results([results]).results} == {f"{checkpoint} ({name})" for name in ("int2", "int8")}
    assert "There is no codec 'zip'" in run(*argv, "--codec", "zip")[2]


def test_kept_answers_are_to_the_same_questions(run, checkpoint, captioned):
    """The same id may be another question, image, split or length: what is kept must not be taken for it."""
    from llava_fwd2bot.cache.codecs import get_codec
    from llava_fwd2bot.evaluation.answers import Answerer, answer_questions

    model, processor = load_fwd2bot(checkpoint)
    encoder, images, answers = Encoder(model, processor, "f"), captioned / "images", captioned / "a.jsonl"
    asked = [{"question_id": i, "image": f"{i}.png", "text": f"is it {'very ' * (i % 3)}red?"} for i in range(6)]
    answer_questions(Answerer(encoder, 4, 4), asked, images, answers, 2, "m")
    whole = sorted(answers.read_text().splitlines())
    for change in ({"image": "5.png"}, {"text": "is it blue?"}):
        with pytest.raises(ValueError, match="the answer to 0 is about the"):
            answer_questions(Answerer(encoder, 4, 4), [{**asked[0], **change}], images, answers, 2, "m")
    with pytest.raises(ValueError, match="max_new_tokens"):
        answer_questions(Answerer(encoder, 5, 4), asked, images, answers, 2, "m")

    other = Answerer(Encoder(model, processor, "f", codec=get_codec("int8")), 4, 4)
    with pytest.raises(ValueError, match="codec = None, not int8"):
        answer_questions(other, asked, images, answers, 2, "m")

    # gone on with, the batches are those of a whole run
    sizes, generate = [], model.generate
    model.generate = lambda **given: sizes.append(len(given["input_ids"])) or generate(**given)
    answers.write_text("".join(line + "\n" for line in whole[:1]))
    assert answer_questions(Answerer(encoder, 4, 4), asked, images, answers, 2, "m")["answered_before"] == 1
    assert sizes == [4, 2] and sorted(answers.read_text().splitlines()) == whole
    kept = answers.read_bytes()  # of all, and now only the first are wanted
    assert answer_questions(Answerer(encoder, 4, 4), asked, images, answers, 2, "m", 2)["answered_before"] == 2
    assert answers.read_bytes() == kept


def test_captions_of_another_split_are_their_own(run, checkpoint, captioned):
    """Images are numbered in a split: those of one must not be taken for those of the next."""
    pytest.importorskip("pycocoevalcap")
    images = captioned / "images"
    argv = ["eval", "captioning", "--model", checkpoint, "--dataset", "flickr30k", "--images", images, "--k", 1]
    argv += ["--work", captioned / "work", "--max-new-tokens", 3, "--device", "cpu"]
    for split in ("test", "val"):
        assert run(*argv, "--split", split, "--output", captioned / "new" / f"{split}.v1.json")[0] == 0
    assert len(list((captioned / "work").glob("captions-*"))) == 2
    assert (captioned / "new" / "val.v1.json").is_file()  # its folder was made before the model was opened


def test_vlmevalkit_gets_what_ask_says(run, checkpoint, captioned, monkeypatch):
    """Against a stand-in of its base class: VLMEvalKit itself is not in any registry."""
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = type("BaseModel", (), {})
    for name, module in (("vlmeval", ModuleType("vlmeval")), ("vlmeval.vlm", ModuleType("vlm")), (base.__name__, base)):
        monkeypatch.setitem(sys.modules, name, module)
    from llava_fwd2bot.evaluation.vlmevalkit import Fwd2Bot

    pictures = [str(captioned / "images" / f"{i}.png") for i in range(2)]
    model = Fwd2Bot(str(checkpoint), k=2, max_new_tokens=6)
    for images in (pictures[:1], pictures):
        message = [{"type": "image", "value": image} for image in images] + [{"type": "text", "value": "what is it?"}]
        ask = [
            "ask",
            "--model",
            checkpoint,
            "--image",
            *images,
            "what is it?",
            "--k",
            2,
            "--max-new-tokens",
            6,
            "--json",
        ]
        assert model.generate_inner(message) == json.loads(run(*ask, "--device", "cpu")[1])["answer"]
    assert isinstance(model.generate_inner([{"type": "text", "value": "what is a dog?"}]), str)
    # the base that retention is measured against, out of the same class
    base = Fwd2Bot(str(checkpoint), max_new_tokens=6, from_base=True)
    said = base.generate_inner([{"type": "image", "value": pictures[0]}, {"type": "text", "value": "what is it?"}])
    prompt = base.formatter.ask([{"from": "human", "value": "<image>\nwhat is it?"}])
    inputs = base.processor(text=prompt, images=Image.open(pictures[0]).convert("RGB"), return_tensors="pt")
    with torch.no_grad(), base.model.fwd2bot_disabled():
        out = base.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == base.processor.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_an_output_must_not_stand_in_the_base(run, checkpoint, captioned, tmp_path):
    """`compress` refused to write into --base, and `eval` did not: the base's configuration was overwritten."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    argv = ["eval", "retrieval", "--model", checkpoint, "--base", base, "--dataset", captioned / "own.jsonl"]
    code, _, err = run(*argv, "--output", base / "config.json")
    assert code == 1 and "--base" in err and (base / "config.json").read_text() == "{}"
