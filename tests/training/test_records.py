"""Records of other layouts, and text that quotes the placeholder."""

from __future__ import annotations

import json

import pytest
from data_fixtures import LLAVA, PROCESSORS, TWO_ROUNDS, learnt, num_images_ids, talk

from llava_fwd2bot.training.original_data import WithCaptions


# Other tools' data were trained on without their images, and nothing was said.
@pytest.mark.parametrize(
    "where", [{"images": ["a.png"]}, {"image_path": "a.png"}, {"image": "a.png", "images": ["a.png"]}]
)
def test_images_under_the_names_of_other_tools(make, where):
    dataset = make([{**where, "conversations": TWO_ROUNDS}], [{**where, "caption": "a cat"}])
    assert len(dataset) == 1 and num_images_ids(dataset[0]) == 4 and dataset.has_images
    assert "caption_ids" in dataset[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video": "a.mp4"}, "has 'video'"),
        ({"image": "a.png", "videos": ["a.mp4"]}, "has 'videos'"),
        ({"photo": "0.JPG"}, "'photo' seems to name an image"),
        ({"media": [{"path": "x/0.jpg"}]}, "'media' seems to name an image"),
        ({"image": "a.png", "images": ["b.png"]}, "'image' and 'images' name different images"),
        ({"images": [{"bytes": "", "path": "a.png"}]}, "'images' should be a text or a list of texts"),
        ({"dialog": [{"role": "user", "content": "q"}], "conversations": []}, "stand under 'dialog'.*'messages'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, record, message):
    with pytest.raises(ValueError, match=r"data.json: record 0: .*" + message):
        make([{"conversations": talk("q", "a"), **record}])


# Texts about file names are no images.
def test_other_keys_stay_free(make):
    dataset = make([{"source": "coco", "model": "gpt-4", "image_id": 7, "conversations": talk("open a.png", "a.jpg")}])
    assert not dataset.has_images


# LLaVA takes <image> without an image for text: its ids are those of the letters, in questions and in answers.
@pytest.mark.parametrize("kind", ["v1-llama", "v1-bytes", "template-eos", "template-eos-bytes", "next"])
def test_a_quoted_placeholder_is_text(make, kind):
    processor = PROCESSORS[kind]
    turns = talk("what is <image> in HTML?", "an <image> is no tag")
    with pytest.warns(UserWarning, match="1 record.s. without a picture hold <image>, which is text"):
        dataset = make([{"conversations": turns}], processor=processor)
    item, tokenizer = dataset[0], processor.tokenizer
    assert num_images_ids(item, processor) == 0
    assert "what is <image> in HTML?" in tokenizer.decode(item["input_ids"])
    assert learnt(dataset, item).strip() == "an <image> is no tag</s>"
    plain = make([{"conversations": talk("what is XimageX in HTML?", "an XimageX is no tag")}], processor=processor)[0]
    swapped = {tokenizer.convert_tokens_to_ids(c) for c in "<>X"}
    kept = [[i for i in x["input_ids"].tolist() if i not in swapped] for x in (item, plain)]
    assert kept[0] == kept[1]  # tokenised as one text, without the gaps that a special token makes


def test_plain_needs_an_image_not_a_quotation(make):
    with pytest.raises(ValueError, match="version 'plain' takes one human turn with <image>"):
        make([{"conversations": talk("<image>", "a")}], version="plain")


def test_a_caption_that_quotes_the_placeholder(make):
    ids = make([{"image": "a.png", "caption": "the word <image>"}])[0]["caption_ids"]
    assert LLAVA.image_token_id not in ids.tolist() and LLAVA.tokenizer.decode(ids).strip() == "the word <image>"


def test_the_original_train_reads_captions_in_the_same_way(folder):
    """Its own code ignored a list under `captions`, and an entry without an image ended in a KeyError."""

    class Data:  # LLaVA's own data set, as far as it is asked
        def __init__(self, *records):
            self.list_data_dict = [{"conversations": TWO_ROUNDS, **record} for record in records]

    def captions(*records, file=None):
        if file is not None:
            (folder / "captions.json").write_text(json.dumps(file), encoding="utf-8")
            file = str(folder / "captions.json")
        return WithCaptions(Data(*records), file, LLAVA.tokenizer, image_folder=str(folder)).captions

    shown = {"image": "a.png"}
    own = [{**shown, "captions": ["one", "two"]}, {**shown, "caption": "own", "captions": ["one"]}, shown]
    assert captions(*own) == [["one", "two"], ["own"], []]
    file = [{"image": "a.png", "captions": ["x"]}, {"images": ["b.png"], "caption": "y"}]
    assert captions(*own, {"image": None}, file=file) == [["one", "two"], ["own"], ["x"], [], ["y"]]
    with pytest.raises(ValueError, match=r"captions.json: caption entry 0: needs one 'image' and a 'caption'"):
        captions(shown, file=[{"caption": "y"}])
    with pytest.raises(ValueError, match="record 1: a 'caption' but no 'image' that it describes"):
        captions(shown, {"captions": ["y"]})
