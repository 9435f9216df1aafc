"""`fwd2bot eval compositionality`: scores by hand, formats, going on after a stop."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.evaluation.compositionality import about, judge, read_items
from llava_fwd2bot.evaluation.likelihood import likelihood


def test_likelihood_is_the_answer_loss(checkpoint, processor):
    """Per answer, of any length, minus the loss that training would see for it."""
    from llava_fwd2bot.processing.conversation import ConversationFormatter
    from llava_fwd2bot.training.data import with_labels

    model, processor = load_fwd2bot(checkpoint)
    summary = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    answers = ["a cat", "two red dogs on the mat"]
    found = likelihood(model, processor, summary, answers, "what is it?")
    for answer, score in zip(answers, found, strict=True):
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": answer}]
        ids, labels = with_labels(processor.tokenizer, *ConversationFormatter(processor)(turns))
        loss = model(input_ids=ids[None], labels=labels[None], summary=summary[None]).answer_loss
        assert score.item() == pytest.approx(-loss.item(), abs=1e-5)


def test_what_passes_a_test():
    """The benchmarks' own definitions, by hand."""
    assert judge("sugarcrepe", torch.tensor([[0.5, 0.5]])) == {"accuracy": False}
    scores, texts = torch.tensor([[0.6, 0.4, 0.5]]), torch.tensor([[1, 0.9, 0.8], [0.9, 1, 0.95], [0.8, 0.95, 1]])
    assert judge("sugarcrepe++", scores, texts) == {"itt": False, "tot": False}
    assert judge("sugarcrepe++", scores.sort(descending=True).values, texts.clamp(max=0.85) + torch.eye(3)) == {
        "itt": True,
        "tot": False,
    }
    assert judge("winoground", torch.tensor([[0.9, 0.1], [0.8, 0.85]])) == {"group": True, "text": True, "image": True}
    assert judge("winoground", torch.tensor([[0.9, 0.1], [0.95, 0.99]])) == {
        "group": False,
        "text": True,
        "image": False,
    }


def test_compositionality_by_command(run, checkpoint, captioned):
    """SugarCrepe's files; a test without its image is an error, or left out and counted."""
    folder = captioned / "sugarcrepe"
    folder.mkdir()
    record = {"filename": "COCO_0.png", "caption": "a red picture", "negative_caption": "a blue picture"}
    (folder / "swap_att.json").write_text(json.dumps({"0": record, "1": {**record, "filename": "gone.png"}}))
    (folder / "add_obj.json").write_text(json.dumps({"0": {**record, "filename": "1.png"}}))
    argv = ["eval", "compositionality", "--model", checkpoint, "--tests", folder, "--images", captioned / "images"]
    argv += ["--work", captioned / "work", "--output", captioned / "r.json", "--device", "cpu"]
    code, _, err = run(*argv)
    assert code == 1 and "gone.png" in err and "--skip-missing" in err
    assert run(*argv, "--skip-missing")[0] == 0
    result = json.loads((captioned / "r.json").read_text())
    assert (result["benchmark"], result["tests"], result["missing"]) == ("sugarcrepe", 2, 1)
    assert [row["by"] for row in result["rows"]] == ["embedding", "likelihood"]
    assert {"add_obj (1)", "swap_att (1)", "accuracy"} <= set(result["rows"][0]["figures"])

    kept = sorted((captioned / "work").glob("likelihood-k4-*"))  # stopped before the second test: the same result
    assert len(kept) == 2
    whole, times = [file.read_bytes() for file in kept], [file.stat().st_mtime_ns for file in kept]
    kept[1].unlink()
    assert run(*argv, "--skip-missing")[0] == 0 and [file.read_bytes() for file in kept] == whole
    assert kept[0].stat().st_mtime_ns == times[0]  # and is not made again
    assert json.loads((captioned / "r.json").read_text())["rows"] == result["rows"]


def test_kept_likelihoods_are_of_the_same_pictures(run, checkpoint, captioned):
    """A picture replaced under its name had the likelihoods of the one before it."""
    tests, images = captioned / "swap.json", captioned / "images"
    record = {"filename": "0.png", "caption": "a red picture", "negative_caption": "a blue picture"}
    tests.write_text(json.dumps([record]))
    argv = ["eval", "compositionality", "--model", checkpoint, "--tests", tests, "--images", images, "--device", "cpu"]
    argv += ["--work", captioned / "work", "--k", 4]
    for count in (1, 1, 2):  # the second time it is kept
        if count == 2:
            Image.effect_noise((64, 64), 90).save(images / "0.png")
        assert run(*argv)[0] == 0
        kept = [file.read_bytes() for file in (captioned / "work").glob("likelihood-*")]
        assert len(set(kept)) == len(kept) == count


def test_results_of_the_same_tests_are_known_wherever_these_lie(captioned):
    """By images, texts and kinds: a result of another subset is not to be compared."""
    record = {"filename": "0.png", "caption": "a red picture", "negative_caption": "a blue picture"}
    (captioned / "swap.json").write_text(json.dumps([record, {**record, "filename": "gone.png"}]))
    found = about(read_items(captioned / "swap.json", captioned / "images", skip_missing=True))
    assert {name: found[name] for name in ("benchmark", "tests", "missing")} == {
        "benchmark": "sugarcrepe",
        "tests": 1,
        "missing": 1,
    }
    (captioned / "images").rename(captioned / "moved")
    (captioned / "swap.json").write_text(json.dumps({"0": record}))
    assert about(read_items(captioned / "swap.json", captioned / "moved"))["of"] == found["of"]
    for change in ({"filename": "1.png"}, {"caption": "red"}):
        (captioned / "swap.json").write_text(json.dumps([{**record, **change}]))
        assert about(read_items(captioned / "swap.json", captioned / "moved"))["of"] != found["of"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"7": {"caption": "a", "negative_caption": "b"}}, "t.json, test 7 has no 'filename'"),
        ([{"filename": "0.png", "caption": None, "negative_caption": "b"}], "test 1: 'caption' must be a text"),
        ([{"filename": "0.png", "caption": "a", "negative_caption": " "}], "test 1: 'negative_caption' must be a text"),
        ([{"caption_0": "a", "caption_1": "b", "image_0": "0"}], "test 1 has no 'image_1'"),
        ([1, 2], "test 1 must be an object, not 1"),
        (3, "t.json must hold a list or an object of tests, not 3"),
        ([], "must hold a list or an object of tests"),
        ({}, "must hold a list or an object of tests"),
    ],
)
def test_tests_of_a_wrong_shape_are_named(captioned, content, message):
    """By file, place and field: they were tracebacks, or were said to be images that are missing."""
    (captioned / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_items(captioned / "t.json", captioned / "images")


def test_winoground_and_sugarcrepe_plus_are_told_by_their_fields(captioned):
    images = captioned / "images"
    tests = captioned / "examples.jsonl"
    tests.write_text(json.dumps({"image_0": "0", "image_1": "1", "caption_0": "a b", "caption_1": "b a"}) + "\n")
    found = read_items(tests, images)
    assert found.kind == "winoground" and found.items[0].images == [images / "0.png", images / "1.png"]
    record = {"filename": "0.png", "caption": "a", "caption2": "b", "negative_caption": "c"}
    (captioned / "replace.json").write_text(json.dumps([record]))
    assert read_items(captioned / "replace.json", images).kind == "sugarcrepe++"
    (captioned / "replace.json").write_text(json.dumps([{"x": 1}]))
    with pytest.raises(ValueError, match="no known benchmark; its fields are x"):
        read_items(captioned / "replace.json", images)


def test_two_ways_with_figures_of_their_own_are_one_table():
    """SugarCrepe++ by likelihood has no text-only figure; the table came after the whole run, and failed."""
    from llava_fwd2bot.evaluation.tables import results_table

    rows = [{"k": 4, "by": "embedding", "figures": {"itt": 0.5, "tot": 0.25, "replace_rel (2)": 1.0}}]
    rows += [{"k": 4, "by": "likelihood", "figures": {"itt": 0.75, "replace_rel (2)": 1.0}}]
    rows = [{**row, "items": 4, "items_of_figure": {"replace_rel (2)": 2}} for row in rows]
    text = results_table({"rows": rows, "tests": 4})
    assert "| image-to-text accuracy | text-only accuracy | replace rel (2) |" in text and "n = 4 tests" in text
    assert "| 4 | likelihood | 75 |  | 100 |" in text
