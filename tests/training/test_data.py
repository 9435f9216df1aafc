"""LLaVA's conversation JSON and caption pairs -> rows: every promise of data.py."""

from __future__ import annotations

import json

import data_toys
import pytest
import torch
from data_fixtures import LLAVA, PROCESSORS, TWO_ROUNDS, learnt, num_images_ids, talk

from llava_fwd2bot.processing.images import open_image
from llava_fwd2bot.training.collator import IGNORE_INDEX
from llava_fwd2bot.training.data import LlavaDataset


# The standard batch means: our ids are those of the processor itself, for both families and several pictures.
@pytest.mark.parametrize("kind", ["v1-llama", "next"])
def test_ids_equal_the_processors_own(make, folder, kind):
    processor = PROCESSORS[kind]
    turns = talk("<image>\n<image>\nhow many dogs?", "two")
    dataset = make([{"image": ["a.png", "b.png"], "conversations": turns}], processor=processor)
    images = [open_image(folder / name) for name in ("a.png", "b.png")]
    expected = processor(text=dataset.formatter(turns)[0], images=images, return_tensors="pt")
    item = dataset[0]
    assert torch.equal(item["input_ids"], expected["input_ids"][0])
    assert torch.equal(item["pixel_values"], expected["pixel_values"])
    assert ("image_sizes" in item) == (kind == "next")
    assert bool((item["labels"][item["input_ids"] == processor.image_token_id] == IGNORE_INDEX).all())


def test_one_picture_has_n_placeholders_in_one_run(make):
    item = make([{"image": "a.png", "conversations": TWO_ROUNDS}])[0]
    where = (item["input_ids"] == LLAVA.image_token_id).nonzero().flatten()
    assert len(where) == 4 and int(where[-1] - where[0]) == 3
    assert item["pixel_values"].shape == (1, 3, 28, 28) and "caption_ids" not in item


# n depends on the picture's size alone, so the expensive question is asked once per size.
def test_placeholders_are_counted_once_per_size(make):
    dataset = make([{"image": name, "conversations": TWO_ROUNDS} for name in ("a.png", "b.png", "a.png")])
    assert [num_images_ids(dataset[i]) for i in range(3)] == [4, 4, 4]
    assert dataset.reader._counts == {(40, 60): 4, (64, 30): 4}


def test_text_only_row(make):
    dataset = make([{"conversations": talk("how many?", "two")}, {"image": None, "conversations": talk("q", "a")}])
    assert set(dataset[0]) == {"record", "input_ids", "labels"} == set(dataset[1])
    assert learnt(dataset, dataset[0]).strip() == "two</s>"


# Names in errors are only useful if they lead to the line in the user's file.
def test_record_names(make):
    dataset = make([{"id": "abc", "conversations": talk("q", "a")}, {"conversations": talk("q", "a")}])
    assert [dataset[0]["record"], dataset[1]["record"]] == ['record 0 (id "abc")', "record 1"]


def test_truncation_cuts_on_the_right(make):
    record = {"image": "a.png", "conversations": TWO_ROUNDS}
    full = make([record])[0]
    cut = make([record], model_max_length=len(full["input_ids"]) - 3)[0]
    assert torch.equal(cut["input_ids"], full["input_ids"][:-3]) and torch.equal(cut["labels"], full["labels"][:-3])


# A cut run of placeholders no longer matches its picture's features: the model would raise far from the cause.
def test_truncation_never_cuts_placeholders(make):
    record = {"id": "abc", "image": "a.png", "conversations": TWO_ROUNDS}
    end = int((make([record])[0]["input_ids"] == LLAVA.image_token_id).nonzero()[-1]) + 1
    assert len(make([record], model_max_length=end)[0]["input_ids"]) == end
    message = rf'record 0 \(id "abc"\): its pictures end at token {end}, beyond --model_max_length {end - 1}'
    with pytest.raises(ValueError, match=message):
        make([record], model_max_length=end - 1)[0]
    with pytest.raises(ValueError, match="beyond --model_max_length 3"):
        make(captions=[{"image": "a.png", "caption": "a cat"}], model_max_length=3)[0]


# Checkpoints converted long ago lack patch_size; transformers then divides by None.
def test_processor_without_patch_size(make):
    processor = data_toys.llava()
    processor.patch_size = None
    with pytest.raises(ValueError, match="no patch_size.*vision_feature_select_strategy"):
        make([{"image": "a.png", "conversations": TWO_ROUNDS}], processor=processor)


# A text template, or text that quotes the processor's own token, would give the model a wrong number of features.
def test_text_with_wrong_number_of_image_tokens(make):
    text_only = (
        "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    text_only += "{% if add_generation_prompt %}[assistant]{% endif %}"
    dataset = make(
        [{"image": "a.png", "conversations": TWO_ROUNDS}], processor=data_toys.llava(chat_template=text_only)
    )
    with pytest.raises(ValueError, match=r"record 0: its text came out with 0 image token\(s\) for 1 image"):
        dataset[0]


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_join_records_and_make_rows(make):
    records = [
        {"image": "a.png", "conversations": TWO_ROUNDS},
        {"image": "a.png", "conversations": TWO_ROUNDS, "caption": "two dogs"},
        {"conversations": talk("q", "a")},
    ]
    captions = [{"image": "a.png", "caption": "a red cat"}, {"image": "b.png", "captions": ["a mat"]}]
    dataset = make(records, captions)
    assert len(dataset) == 4 and dataset.num_captioned and not make(records[2:]).num_captioned
    texts = [
        dataset.tokenizer.decode(item["caption_ids"]).strip() if "caption_ids" in item else None for item in dataset
    ]
    assert texts == ["a red cat", "two dogs", None, "a mat"]
    extra = dataset[3]
    # only BOS and the picture: a caption's row has no prompt, and nothing in it is to be predicted
    assert extra["input_ids"].tolist() == [1] + [LLAVA.image_token_id] * 4
    assert bool((extra["labels"] == IGNORE_INDEX).all()) and extra["record"] == 'caption of "b.png"'


def test_captions_of_a_record_are_its_captions(make):
    """A list under `captions` was ignored in a record, and read in a caption file."""
    turns = {"image": "a.png", "conversations": TWO_ROUNDS}
    records = [
        {**turns, "captions": ["one", "two"]},
        {**turns, "captions": "one"},
        {"image": "a.png", "captions": ["x"]},
    ]
    records += [{**turns, "caption": "own", "captions": ["one"]}, {**turns, "caption": " ", "captions": ["one"]}]
    captions = [{"image": "a.png", "caption": "", "captions": ["of the file"]}]
    rows = make([*records, turns], captions).rows
    assert [row.captions for row in rows] == [["one", "two"], ["one"], ["x"], ["own"], ["one"], ["of the file"]]
    with pytest.raises(ValueError, match=r"record 0: 'captions' should be a text or a list of texts, not \[1\]"):
        make([{**turns, "captions": [1]}])


def test_captions_alone_and_caption_only_records(make):
    bytes_processor = PROCESSORS["v1-bytes"]
    alone = make(captions=[{"image": "a.png", "caption": "a cat"}], processor=bytes_processor)[0]
    assert alone["input_ids"].tolist() == [bytes_processor.image_token_id] * 4  # this tokenizer has no BOS
    assert num_images_ids(make([{"image": "a.png", "caption": ["a cat"]}])[0]) == 4
    closing = data_toys.llava(data_toys.llama_tokenizer(eos=True))  # add_eos_token: nothing may follow the picture
    row = make(captions=[{"image": "a.png", "caption": "a cat"}], processor=closing)[0]
    assert row["input_ids"].tolist() == [1] + [closing.image_token_id] * 4


# COCO has several captions per picture, in one entry or in several lines.
def test_caption_choice_is_a_function_of_seed_epoch_index(make):
    texts = [f"{number} dogs" for number in range(10)]
    entries = [{"image": "a.png", "captions": texts[:5]}, *({"image": "a.png", "caption": t} for t in texts[5:])]

    def draw(dataset, epoch):
        dataset.set_epoch(epoch)
        return tuple(dataset[0]["caption_ids"].tolist())

    dataset = make(captions=entries)
    drawn = [draw(dataset, epoch) for epoch in range(8)]
    assert len(set(drawn)) > 2
    resumed = make(captions=entries)
    assert draw(resumed, 5) == drawn[5] == draw(dataset, 5)
    assert [draw(make(captions=entries, seed=1), epoch) for epoch in range(8)] != drawn


# Workers that live across epochs hold a copy of the dataset; set_epoch must reach it or all epochs draw alike.
def test_set_epoch_reaches_persistent_workers(make):
    dataset = make(captions=[{"image": "a.png", "captions": [f"{number} dogs" for number in range(10)]}])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        [item] = list(loader)
        assert torch.equal(item["caption_ids"], dataset[0]["caption_ids"])


def test_captions_are_cut(make):
    captions = [{"image": "a.png", "caption": "a cat on a mat " * 30}]
    assert len(make(captions=captions)[0]["caption_ids"]) == 77
    ids = make(captions=captions, caption_max_length=3)[0]["caption_ids"]
    assert ids.shape == (3,) and int(ids[0]) != LLAVA.tokenizer.bos_token_id


@pytest.mark.parametrize("entry", [{"image": "a.png"}, {"caption": "a"}, {"image": "a.png", "caption": " "}])
def test_bad_caption_entries(make, entry):
    with pytest.raises(ValueError, match="caption entry 1: needs one 'image' and a 'caption'"):
        make(captions=[{"image": "a.png", "caption": "a"}, entry])


# --- lengths ---------------------------------------------------------------------------------------------------------


# Samplers ask for these before training; opening 665k pictures for it would take hours, so none needs to exist.
def test_lengths_without_opening_pictures(make):
    records = [
        {"image": "missing.png", "conversations": talk("<image>\nhow many dogs", "two")},
        {"conversations": talk("a b c", "d e")},
        {"image": "missing.png", "caption": "a"},
        {"conversations": talk("", "")},
    ]
    dataset = make(records)
    assert dataset.lengths == [133, 5, 128, 1]
    assert dataset.modality_lengths == [133, -5, 128, -1]


# --- files and records that are wrong -------------------------------------------------------------------------------


def test_json_and_jsonl_are_read_alike(folder):
    records = [{"conversations": talk("q\u2028still q", "a")}, {"conversations": talk("q", "b")}]
    (folder / "x.json").write_text(json.dumps(records), encoding="utf-8")
    # utf-8-sig: Windows editors put a byte order mark in front. U+2028 is no line end in JSON.
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    (folder / "x.jsonl").write_text(lines, encoding="utf-8-sig")
    first, second = (LlavaDataset(folder / name, LLAVA) for name in ("x.json", "x.jsonl"))
    assert first.rows == second.rows and len(first) == 2


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.json", None, FileNotFoundError, "none.json: no such data file"),
        ("x.json", '[{"a": 1},\n {"b" 2}]', ValueError, r"x.json: not JSON at line 2, column 7 \(char 17\)"),
        ("x.jsonl", '{"a": 1}\n{"b" 2}', ValueError, "x.jsonl: not JSON at line 2, column 6"),
        ("x.json", '{"a": 1}\n{"b": 2}', ValueError, "one object per line. Name it .jsonl"),
        ("x.json", "[]", ValueError, "x.json: no records"),
        ("x.json", "", ValueError, "x.json: no records"),
        ("x.jsonl", "\n", ValueError, "x.jsonl: no records"),
        ("x.json", '{"a": 1}', ValueError, "should be a list of records"),
        ("x.json", "[1]", ValueError, "should be a list of records"),
        ("x.json", b"\xff\xfe\x00", ValueError, r"x.json: not UTF-8 text \(byte 0\)"),
    ],
)
def test_bad_files(folder, name, content, error, message):
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        LlavaDataset(folder / name, LLAVA)


def test_no_data_at_all():
    with pytest.raises(ValueError, match="give data_path, caption_data or both"):
        LlavaDataset(None, LLAVA)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "neither 'conversations' nor 'caption'"),
        ({"conversations": []}, "neither 'conversations' nor 'caption'"),
        ({"image": "a.png", "caption": " "}, "neither 'conversations' nor 'caption'"),
        ({"caption": "a"}, "a 'caption' but no 'image'"),
        ({"image": 3, "conversations": talk("q", "a")}, "'image' should be a text or a list of texts, not 3"),
        ({"conversations": [{"from": "user", "value": "q"}]}, "turn 0 is from 'user'; known are 'human' and 'gpt'"),
        ({"conversations": [{"from": "human"}]}, "turn 0 should be"),
        ({"conversations": "q"}, "turn 0 should be"),
        ({"conversations": talk("q")}, "turns should go human, gpt"),
        ({"conversations": talk("q", "a", "q")}, "turns should go human, gpt"),
        ({"conversations": talk("q", "a")[1:]}, "turns should go human, gpt"),
        ({"conversations": talk("q", "a") + talk("q", "a")[1:]}, "turns should go human, gpt"),
        ({"image": "a.png", "conversations": talk("q", "a")}, r"0 <image> .* but 1 image\(s\); put '<image>"),
        ({"image": "a.png", "conversations": talk("<image><image>", "a")}, r"2 <image> .* but 1 image\(s\); name all"),
        ({"image": ["a.png", "b.png"], "conversations": talk("<image>\nq", "a")}, r"1 <image> .* but 2 image\(s\)"),
        ({"image": "a.png", "conversations": talk("q", "<image>")}, "<image> stands in an answer"),
    ],
)
def test_bad_records_are_named_at_construction(make, record, message):
    with pytest.raises(ValueError, match=r'record 1 \(id "abc"\): .*' + message):
        make([{"conversations": talk("q", "a")}, {"id": "abc", **record}])


# ShareGPT, part of LLaVA's own mix, has conversations that open with gpt; LLaVA drops that turn, and so do we, aloud.
def test_leading_gpt_turn_is_dropped_with_a_warning(make):
    turns = [{"from": "gpt", "value": "hello"}, *talk("q", "a")]
    with pytest.warns(UserWarning, match=r"dropped the leading gpt turn of 1 record\(s\), as LLaVA does: record 0"):
        dataset = make([{"conversations": turns}])
    assert dataset.rows[0].turns == talk("q", "a")
