"""LLaVA's conversation JSON and caption pairs -> batches: every promise of data.py and images.py."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from types import SimpleNamespace

import data_toys
import numpy as np
import pytest
import torch
from PIL import Image

from llava_fwd2bot.batching import IGNORE_INDEX, Fwd2BotCollator, ModalityLengthSampler
from llava_fwd2bot.conversation import SYSTEM_V1, ConversationFormatter
from llava_fwd2bot.data import LlavaDataset
from llava_fwd2bot.images import ImageError, open_image

PROCESSORS = {
    "v1-llama": data_toys.llava(),
    "v1-bytes": data_toys.llava(data_toys.byte_tokenizer()),
    "template-no-eos": data_toys.llava(chat_template=data_toys.TEMPLATE_WITHOUT_EOS),
    "template-eos": data_toys.llava(chat_template=data_toys.TEMPLATE_WITH_EOS),
    "template-eos-bytes": data_toys.llava(data_toys.byte_tokenizer(), data_toys.TEMPLATE_WITH_EOS),
    "next": data_toys.llava_next(),
}
LLAVA = PROCESSORS["v1-llama"]


def talk(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


TWO_ROUNDS = talk("<image>\nwhat is in the picture?", "a red cat", "how many dogs?", "two é dogs")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 60), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 30), (10, 200, 10)).save(tmp_path / "b.png")
    return tmp_path


@pytest.fixture
def make(folder):
    """make(records, captions=..., processor=..., **options) -> LlavaDataset on files in `folder`."""

    def build(records=None, captions=None, processor=LLAVA, **options):
        paths = []
        for name, content in (("data.json", records), ("captions.json", captions)):
            paths.append(None if content is None else folder / name)
            if content is not None:
                (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return LlavaDataset(paths[0], processor, folder, paths[1], **options)

    return build


def learnt(dataset, item) -> str:
    return dataset.tokenizer.decode(item["labels"][item["labels"] != IGNORE_INDEX])


def num_images_ids(item, processor=LLAVA) -> int:
    return int((item["input_ids"] == processor.image_token_id).sum())


# --- conversations -> text and labels --------------------------------------------------------------------------------


# The labels ARE the training signal: over several rounds they must be the answers and end tokens, no more, no less,
# whatever the tokenizer does at the seams and whether or not the template writes the end token.
@pytest.mark.parametrize("kind", PROCESSORS)
def test_labels_decode_to_exactly_the_answers(make, kind):
    dataset = make([{"id": "0", "image": "a.png", "conversations": TWO_ROUNDS}], processor=PROCESSORS[kind])
    item = dataset[0]
    rounds = [part.strip() for part in learnt(dataset, item).split("</s>")]
    assert rounds == ["a red cat", "two é dogs", ""]
    kept = item["labels"] != IGNORE_INDEX
    assert torch.equal(item["labels"][kept], item["input_ids"][kept])


# A model asked with another prefix than it was trained with answers worse, so the ids must agree, not just the text.
@pytest.mark.parametrize("kind", PROCESSORS)
def test_prompt_is_the_prefix_that_training_used(make, kind):
    processor = PROCESSORS[kind]
    dataset = make([{"image": "a.png", "conversations": TWO_ROUNDS}], processor=processor)
    prompt = dataset.formatter.prompt("what is in the picture?")
    text, spans = dataset.formatter(TWO_ROUNDS)
    assert text.startswith(prompt) and spans[0][0] == len(prompt)
    ids = processor(text=prompt, images=open_image(dataset.reader.image_folder / "a.png"))["input_ids"]
    ids = list(ids[0]) if isinstance(ids[0], (list, tuple)) else list(ids)
    item = dataset[0]
    first = int((item["labels"] != IGNORE_INDEX).nonzero()[0])
    assert item["input_ids"][:first].tolist() == ids


# vicuna_v1 is what LLaVA-1.5 was trained with; a changed space changes the ids of every row.
def test_v1_text_is_vicunas():
    for version in ("v1", "vicuna_v1", "auto"):
        text, _ = ConversationFormatter(LLAVA, version)(TWO_ROUNDS)
        assert text == (
            f"{SYSTEM_V1} USER: <image>\nwhat is in the picture? ASSISTANT: a red cat</s>"
            "USER: how many dogs? ASSISTANT: two é dogs</s>"
        )


# LLaVA's first stage learns caption and newline after the bare picture; the human's words are not shown.
def test_plain_is_picture_caption_newline(make):
    records = [{"image": "a.png", "conversations": talk("<image>\nDescribe it.", "a red cat")}]
    dataset = make(records, version="plain")
    assert dataset.formatter(records[0]["conversations"]) == ("<image>a red cat\n", [(7, 17)])
    assert learnt(dataset, dataset[0]).strip(" ") == "a red cat\n"
    assert dataset.formatter.prompt("ignored", num_images=2) == "<image><image>"
    for turns in (TWO_ROUNDS, talk("no picture", "a")):
        with pytest.raises(ValueError, match="record 0: version 'plain' takes one human turn with <image>"):
            make(
                [{"image": "a.png", "conversations": turns}] if turns is TWO_ROUNDS else [{"conversations": turns}],
                version="plain",
            )


# A prompt that ends in a space shares its last token with the answer ("▁a"); that token must still be learnt, else
# answers of one word train nothing but the end token.
def test_token_across_prompt_and_answer_is_learnt(make):
    template = data_toys.TEMPLATE_WITHOUT_EOS.replace("'ASSISTANT:'", "'ASSISTANT: '")
    dataset = make([{"conversations": talk("how many?", "two")}], processor=data_toys.llava(chat_template=template))
    assert learnt(dataset, dataset[0]).strip() == "two</s>"


# The chat template wins under "auto", and the end token it lacks is added: else the model never learns to stop.
def test_template_without_eos_gets_one():
    text, spans = ConversationFormatter(PROCESSORS["template-no-eos"])(TWO_ROUNDS)
    assert text == (
        "USER: <image>\nwhat is in the picture? ASSISTANT: a red cat</s>USER: how many dogs? ASSISTANT: two é dogs</s>"
    )
    assert [text[a:b] for a, b in spans] == [" a red cat</s>", " two é dogs</s>"]


# A template's own end token is learnt once, and what it writes after it (a newline) is not learnt.
def test_template_with_eos_is_left_as_it_is():
    text, spans = ConversationFormatter(PROCESSORS["template-eos"])(TWO_ROUNDS)
    assert [text[a:b] for a, b in spans] == ["a red cat</s>", "two é dogs</s>"]
    assert text.endswith("[assistant]\ntwo é dogs</s>\n") and text.count("</s>") == 4


# One-letter answers occur inside "</s>", and answers may quote it: neither may lose or double the real end token.
@pytest.mark.parametrize("kind", ["v1-llama", "template-no-eos", "template-eos"])
@pytest.mark.parametrize("answer", ["s", "a </s> b", "", "/"])
def test_end_token_with_awkward_answers(kind, answer):
    text, [(start, end)] = ConversationFormatter(PROCESSORS[kind])(talk("q", answer))
    assert text[start:end].strip() == f"{answer}</s>"


# Where several pictures stand matters to the question; a lone one goes first, as LLaVA puts it.
def test_where_pictures_stand():
    v1 = ConversationFormatter(LLAVA, "v1")
    assert "USER: <image>\nWhat? ASSISTANT:" in v1(talk("What?\n<image>", "a"))[0]
    assert "USER: Compare <image> and <image>? ASSISTANT:" in v1(talk("Compare <image> and <image>?", "a"))[0]
    template = ConversationFormatter(PROCESSORS["template-eos"])
    assert "\nCompare <image>\n and <image>\n?</s>" in template(talk("Compare <image> and <image>?", "a"))[0]
    assert "[user]\n<image>\n<image>\nq</s>" in template(talk("<image>\n<image>\nq", "a"))[0]
    assert "[user]\n<image>\n<image>\nq</s>" in template(talk("<image> <image> q", "a"))[0]
    assert "[user]\nq<image>\n</s>" in template(talk("q\n<image>", "a"))[0]


def test_prompt_counts_pictures():
    v1 = ConversationFormatter(LLAVA, "v1")
    assert v1.prompt("q", num_images=0).endswith("USER: q ASSISTANT:")
    assert v1.prompt("q", num_images=2).endswith("USER: <image>\n<image>\nq ASSISTANT:")
    assert v1.prompt("<image>\nq") == v1.prompt("q")
    with pytest.raises(ValueError, match="the question holds 1 <image> but num_images is 2"):
        v1.prompt("<image>\nq", num_images=2)


# Someone coming from LLaVA passes one of its other names: say what there is instead of training on a wrong format.
def test_unknown_version_lists_the_known():
    for version in ("llava_llama_2", "v0", "template", ""):
        with pytest.raises(ValueError, match=r"is not known here; known are 'v1' .*'plain' and 'auto'"):
            ConversationFormatter(LLAVA, version)


# Templates that rewrite history (dropped thoughts, trimmed turns) would train on prompts that inference never builds.
def test_rewriting_and_raising_templates_are_named():
    rewriting = "{% for m in messages %}{{ loop.revindex }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    with pytest.raises(ValueError, match="record 7: the chat template rewrites earlier turns"):
        ConversationFormatter(data_toys.llava(chat_template=rewriting))(TWO_ROUNDS, "record 7")
    raising = "{{ raise_exception('no pictures here') }}"
    with pytest.raises(ValueError, match="record 7: the chat template failed: no pictures here"):
        ConversationFormatter(data_toys.llava(chat_template=raising))(TWO_ROUNDS, "record 7")


def test_tokenizer_without_eos_is_refused():
    processor = data_toys.llava(data_toys.llama_tokenizer())
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        ConversationFormatter(processor)


# A template that writes BOS itself plus a tokenizer that adds it gives two: ids the base has never seen.
@pytest.mark.parametrize("template", [data_toys.TEMPLATE_WITH_EOS, "{{ '<s>' }}" + data_toys.TEMPLATE_WITH_EOS])
def test_never_two_bos(make, template):
    processor = data_toys.llava(chat_template=template)
    ids = make([{"image": "a.png", "conversations": TWO_ROUNDS}], processor=processor)[0]["input_ids"]
    assert ids[0] == processor.tokenizer.bos_token_id and int((ids == ids[0]).sum()) == 1


# Offsets are the whole method; a slow tokenizer has none and must not fail later with a KeyError.
def test_slow_tokenizer_is_refused(make):
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(ValueError, match="only a fast tokenizer"):
        make([{"conversations": talk("q", "a")}], processor=slow)


# --- rows ------------------------------------------------------------------------------------------------------------


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
    assert len(dataset) == 4 and dataset.has_captions and not make(records[2:]).has_captions
    texts = [
        dataset.tokenizer.decode(item["caption_ids"]).strip() if "caption_ids" in item else None for item in dataset
    ]
    assert texts == ["a red cat", "two dogs", None, "a mat"]
    extra = dataset[3]
    # only BOS and the picture: a caption's row has no prompt, and nothing in it is to be predicted
    assert extra["input_ids"].tolist() == [1] + [LLAVA.image_token_id] * 4
    assert bool((extra["labels"] == IGNORE_INDEX).all()) and extra["record"] == 'caption of "b.png"'


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
        ({"conversations": talk("<image>\nq", "a")}, r"1 <image> .* but 0 image\(s\); name the pictures in 'image'"),
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


# --- pictures --------------------------------------------------------------------------------------------------------


def png(size=(40, 30), **kwargs) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, **{"format": "PNG", **kwargs})
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.png: no such file; check the name"),
        (b"", r"x.png: the file is empty \(0 bytes\); download"),
        (b"<html>404</html>", "x.png: not a picture that Pillow can read; remove it or convert"),
        (png()[:-900], "x.png: damaged or truncated .*download or copy it again"),
        (png(format="JPEG")[:-300], "x.png: damaged or truncated"),
        (png()[:40], "x.png: (damaged or truncated|not a picture)"),
    ],
)
def test_bad_pictures(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        open_image(tmp_path / "x.png")


def test_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageError, match="is a folder, not a picture"):
        open_image(tmp_path)


# 20,000 x 20,000 in a file of 50 kB: it must be refused from its header, before 1.2 GB are allocated, and Pillow's own
# warnings and errors at other limits must not come first.
def test_huge_picture_is_refused_by_its_header(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ImageError, match="20000x20000 = 400,000,000 pixels, over the limit of 178,956,970.*max_pixels"
        ):
            open_image(tmp_path / "x.png")
        Image.new("1", (10_000, 10_000)).save(tmp_path / "y.png")  # Pillow warns here, below our limit
        assert open_image(tmp_path / "y.png").size == (10_000, 10_000)
        (tmp_path / "z.png").write_bytes(png((40, 30)))
        with pytest.raises(ImageError, match="40x30 = 1,200 pixels, over the limit of 1,199"):
            open_image(tmp_path / "z.png", max_pixels=1199)
        assert open_image(tmp_path / "z.png", max_pixels=1200).size == (40, 30)


# A limit above Pillow's own has to work too: that is what the option is for.
def test_limit_can_be_raised_above_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "x.png").write_bytes(png((40, 30)))
    assert open_image(tmp_path / "x.png").size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100  # other code's protection stays as it was


def test_modes_become_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    for name, image, options in (
        ("p.png", palette, {"transparency": b"\x00\x80"}),  # Pillow warns about this kind in a direct convert
        ("rgba.png", red.convert("RGBA"), {}),
        ("cmyk.jpg", red.convert("CMYK"), {"quality": 100}),
        ("anim.gif", red, {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (0, 255, 0))]}),  # first frame
    ):
        image.save(tmp_path / name, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_image(tmp_path / name)
        r, g, b = opened.getpixel((4, 4))
        assert opened.mode == "RGB" and r > 240 and g < 15 and b < 15, name


# A plain convert("RGB") turns 16-bit greys above 255 white: scans and depth maps would be blank.
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16)).save(tmp_path / f"x.{suffix}")
    assert open_image(tmp_path / f"x.{suffix}").getpixel((0, 0)) == (128, 128, 128)


# LLaVA ignores EXIF orientation; turning here would differ from what the base model saw in training.
def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (20, 10)


# Thin pictures look like channels-first arrays to a careless processor; their colours must survive.
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (50, 1), (1, 50), (50, 3)])
def test_tiny_pictures_are_fine(make, folder, size):
    Image.new("RGB", size, (255, 0, 0)).save(folder / "tiny.png")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(folder / "red.png")
    tiny, red = make([{"image": name, "conversations": TWO_ROUNDS} for name in ("tiny.png", "red.png")])
    assert torch.equal(tiny["pixel_values"], red["pixel_values"]) and torch.equal(tiny["input_ids"], red["input_ids"])


# A missing file is known only at access, so the message must lead back to record, path and option.
def test_bad_picture_names_record_and_folder(make, folder):
    dataset = make([{"id": "abc", "image": "gone.png", "conversations": TWO_ROUNDS}])
    with pytest.raises(
        ImageError, match=r'record 0 \(id "abc"\): .*gone.png: no such file.*--image_folder is '
    ) as info:
        dataset[0]
    assert str(folder) in str(info.value)
    with pytest.raises(ImageError, match="40x60 = 2,400 pixels, over the limit of 100"):
        make([{"image": "a.png", "conversations": TWO_ROUNDS}], max_pixels=100)[0]


# --- collator --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(make):
    records = [
        {"image": "a.png", "conversations": TWO_ROUNDS, "caption": "a red cat"},
        {"conversations": talk("how many dogs?", "two")},
        {"image": ["b.png", "a.png"], "conversations": talk("<image> and <image>", "yes")},
    ]
    return make(records, [{"image": "b.png", "caption": "a mat"}])


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch(mixed, side):
    items = list(mixed)
    batch = Fwd2BotCollator(pad_token_id=0, padding_side=side)(items)
    for i, item in enumerate(items):
        real = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][real], item["input_ids"])
        assert torch.equal(batch["labels"][i][real], item["labels"])
        assert bool((batch["labels"][i][~real] == IGNORE_INDEX).all() and (batch["input_ids"][i][~real] == 0).all())
        assert bool(real[-1 if side == "left" else 0])
        caption = batch["caption_input_ids"][i][batch["caption_attention_mask"][i].bool()]
        assert caption.tolist() == (item["caption_ids"].tolist() if "caption_ids" in item else [])
    assert torch.equal(batch["pixel_values"], torch.cat([items[i]["pixel_values"] for i in (0, 2, 3)]))
    assert all(batch[key].dtype == torch.long for key in batch if key != "pixel_values")
    assert "image_sizes" not in batch


def test_batch_leaves_out_what_is_not_there(mixed):
    assert set(Fwd2BotCollator(0)([mixed[1]])) == {"input_ids", "attention_mask", "labels"}


# LLaVA-NeXT's pictures have different numbers of crops; a plain cat of rows fails.
def test_batch_of_next_pads_crops(make, folder):
    Image.new("RGB", (200, 20)).save(folder / "wide.png")
    records = [{"image": name, "conversations": TWO_ROUNDS} for name in ("a.png", "wide.png")]
    first, second = make(records, processor=PROCESSORS["next"])
    assert first["pixel_values"].shape[1] != second["pixel_values"].shape[1]
    batch = Fwd2BotCollator(0)([first, second])
    assert batch["image_sizes"].tolist() == [[60, 40], [20, 200]]
    for i, item in enumerate((first, second)):
        crops = item["pixel_values"].shape[1]
        assert torch.equal(batch["pixel_values"][i, :crops], item["pixel_values"][0])
        assert not bool(batch["pixel_values"][i, crops:].any())


# LLaVA's most reported fault is a loss of 0 from rows whose labels were all masked: never in silence.
def test_batch_without_labels_is_an_error(make):
    dataset = make([{"id": i, "conversations": talk("how many dogs?", "two")} for i in range(7)], model_max_length=9)
    message = r'whole batch \(record 0 \(id "0"\), .* and 2 more\). Likely reasons: --model_max_length'
    with pytest.raises(ValueError, match=message):
        Fwd2BotCollator(0)(list(dataset))


# The first token is predicted from nothing, so a label there alone trains nothing either.
def test_label_on_first_token_does_not_count():
    item = {"record": "record 0", "input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, IGNORE_INDEX])}
    with pytest.raises(ValueError, match="no token to learn from"):
        Fwd2BotCollator(0)([item])


def test_single_row_without_labels_is_warned_of_once(make):
    records = [
        {"conversations": talk("q", "two")},
        {"id": "abc", "conversations": talk("how many dogs? " * 40, "two")},
    ]
    items = list(make(records, model_max_length=150))
    collator = Fwd2BotCollator(0)
    with pytest.warns(UserWarning, match=r'record 1 \(id "abc"\): no token to learn from'):
        collator(items)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator(items)


# Caption rows have no labels by design: neither error nor warning.
def test_batch_of_captions_alone_is_fine(make):
    items = list(make(captions=[{"image": name, "caption": "a cat"} for name in ("a.png", "b.png")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Fwd2BotCollator(0)(items)
    assert batch["pixel_values"].shape[0] == 2 and bool(batch["caption_attention_mask"].all())


def test_collator_arguments():
    with pytest.raises(ValueError, match="pad_token_id is None; set tokenizer.pad_token"):
        Fwd2BotCollator(None)
    with pytest.raises(ValueError, match="padding_side should be 'right' or 'left', not 'both'"):
        Fwd2BotCollator(0, "both")


# --- sampler ---------------------------------------------------------------------------------------------------------


LENGTHS = [(1 if i % 3 else -1) * (1 + (i * 7919) % 1000) for i in range(1003)]


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 2), (16, 4), (600, 1), (2000, 1)])
def test_sampler_covers_every_index_once(batch_size, world_size):
    sampler = ModalityLengthSampler(LENGTHS, batch_size, world_size)
    assert len(sampler) == 1003 and Counter(sampler) == Counter(range(1003))


# A step of mixed modality idles the text ranks while others encode pictures; mixed lengths pad. Only the tail may mix.
def test_sampler_steps_have_one_modality_and_similar_lengths():
    order = list(ModalityLengthSampler(LENGTHS, batch_size=4, world_size=2, seed=3))
    steps = [order[i : i + 8] for i in range(0, len(order), 8)]
    whole = sum(count // 8 for count in Counter(length > 0 for length in LENGTHS).values())
    spreads = []
    for step in steps[:whole]:
        assert len({LENGTHS[i] > 0 for i in step}) == 1
        sizes = [abs(LENGTHS[i]) for i in step]
        spreads.append(max(sizes) - min(sizes))
    assert max(spreads) < 150  # unsorted steps of 8 spread over about 780 of the 1000
    firsts = [abs(LENGTHS[step[0]]) for step in steps[:whole]]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)  # no drift in length over the epoch
    assert len({LENGTHS[i] > 0 for step in steps[: whole // 4] for i in step}) == 2  # nor in modality


# Resuming skips batches by replaying the sampler: the order must come from (seed, epoch) and nothing else.
def test_sampler_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ModalityLengthSampler(LENGTHS, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(0, 2)
    torch.manual_seed(1)
    assert order(0, 2) == first
    assert order(0, 3) != first and order(1, 2) != first and order(1, 0) != order(0, 1)


def test_sampler_edges():
    assert list(ModalityLengthSampler([], 4)) == []
    assert sorted(ModalityLengthSampler([5, 6, 7], 2)) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1, not 0 and 1"):
        ModalityLengthSampler([1], 0)
