"""Conversations -> text and labels: every promise of conversation.py, as the data set uses it."""

from __future__ import annotations

from types import SimpleNamespace

import data_toys
import pytest
import torch
from data_fixtures import LLAVA, PROCESSORS, TWO_ROUNDS, learnt, talk

from llava_fwd2bot.processing.conversation import SYSTEM_V1, ConversationFormatter
from llava_fwd2bot.processing.images import open_image
from llava_fwd2bot.training.collator import IGNORE_INDEX


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
