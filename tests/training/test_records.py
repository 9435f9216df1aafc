"""Records of other layouts, and text that quotes the placeholder."""

from __future__ import annotations

import pytest
from data_fixtures import LLAVA, PROCESSORS, TWO_ROUNDS, learnt, num_images_ids, talk


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
