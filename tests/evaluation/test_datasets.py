"""Data sets of images and captions: every format that is read, and what is wrong with one."""

from __future__ import annotations

import json

import pytest

from llava_fwd2bot.evaluation.datasets import read_captioned


def test_one_data_set_in_every_format(captioned):
    own = read_captioned(str(captioned / "own.jsonl"))
    assert len(own) == 6 and own.captions[0] == ["a red picture", "red all over"]
    for file in ("own.json", "captions.json"):
        assert read_captioned(str(captioned / file)).captions == own.captions
    flickr = read_captioned("flickr30k", captioned / "images")
    assert flickr.paths == own.paths[:4] and flickr.captions == own.captions[:4]
    assert len(read_captioned("flickr30k", captioned / "images", split="val")) == 2
    nocaps = {"images": captioned / "images", "annotations": captioned / "captions.json", "split": "in-domain"}
    assert len(read_captioned("nocaps", **nocaps)) == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entries: entries[0].update(image="gone.png"), "1 of 6 images of"),
        (lambda entries: entries[0].update(image="1.png"), "1 images occur twice, the first: 1.png"),
        (lambda entries: entries[0].update(captions=[]), "1 images have no caption, the first: 0.png"),
        (lambda entries: entries[0].update(captions=["a", " "]), "must be texts that are not empty"),
        (lambda entries: entries[0].pop("image"), "a record has no 'image'"),
    ],
)
def test_bad_data_sets_are_named(captioned, change, message):
    """A hole in the data would move every rank, and show in no figure."""
    entries = json.loads((captioned / "own.json").read_text())
    change(entries)
    (captioned / "own.json").write_text(json.dumps(entries))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_captioned(str(captioned / "own.json"))


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("captions.json", lambda d: d.pop("images"), "captions.json has no 'images'"),
        ("captions.json", lambda d: d["images"][1].update(id=0), "image 2: another image has the id 0 too"),
        ("captions.json", lambda d: d["images"][1].pop("file_name"), "image 2 has no 'file_name'"),
        ("captions.json", lambda d: d["annotations"][2].update(caption=None), "annotation 3: 'caption' must be a text"),
        ("captions.json", lambda d: d["annotations"][2].update(caption=" "), "annotation 3: 'caption' must be a text"),
        ("captions.json", lambda d: d["annotations"].clear(), "6 images have no caption, the first: 0.png"),
        ("captions.json", lambda d: d["annotations"].append(3), "annotation 13 needs 'image_id'"),
        ("images/dataset_flickr30k.json", lambda d: d["images"][1].pop("split"), "image 2 has no 'split'"),
        ("images/dataset_flickr30k.json", lambda d: d["images"][1].pop("sentences"), "1.png has no 'sentences'"),
        ("images/dataset_flickr30k.json", lambda d: d["images"][1]["sentences"][0].update(raw=""), "1.png: 'raw' must"),
        ("images/dataset_flickr30k.json", lambda d: d.update(images=3), "'images' must be a list, not 3"),
    ],
)
def test_bad_coco_and_karpathy_files_are_named(captioned, file, change, message):
    """The place and the field, where there was a traceback, or a caption that was silently lost."""
    content = json.loads((captioned / file).read_text())
    change(content)
    (captioned / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_captioned(str(captioned / file), captioned / "images")


@pytest.mark.parametrize("content", ["3", "null", '"images"'])
def test_json_of_no_data_set_is_named(captioned, content):
    (captioned / "own.json").write_text(content)
    with pytest.raises(ValueError, match="own.json is not in Karpathy's or COCO's format, nor a list"):
        read_captioned(str(captioned / "own.json"))


def test_a_split_that_is_not_there_is_no_other_split(captioned):
    """All images under the name of a part of them: a figure of another set, with nothing to show it."""
    for file in ("own.json", "own.jsonl"):
        with pytest.raises(ValueError, match="is a list and has no splits: leave out --split val"):
            read_captioned(str(captioned / file), split="val")
    coco = captioned / "captions.json"
    with pytest.raises(ValueError, match="no image in split 'out-domian'; its splits: in-domain"):
        read_captioned(str(coco), split="out-domian")
    with pytest.raises(ValueError, match="no image in split 'tset'; its splits: test, val"):
        read_captioned("flickr30k", captioned / "images", split="tset")
    content = json.loads(coco.read_text())
    for image in content["images"]:
        del image["domain"]
    coco.write_text(json.dumps(content))
    assert len(read_captioned(str(coco))) == 6
    with pytest.raises(ValueError, match="its splits: none, leave out --split"):
        read_captioned(str(coco), split="in-domain")
