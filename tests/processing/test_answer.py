"""answer(): one call for prompt, images or summaries, and text; equal to the steps by hand, and in words where not."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import settings, shake
from PIL import Image
from transformers import LlavaForConditionalGeneration, TextStreamer

from llava_fwd2bot import add_fwd2bot, answer
from llava_fwd2bot.processing.conversation import ConversationFormatter

SHORT = {"max_new_tokens": 6}
QUESTION = "how many dogs are there"


@pytest.fixture(scope="module")
def speaker(own_base, processor):
    """A model whose answers are printable words; trained with 1, 2 and 4 tokens."""
    pixels = torch.randint(0, 255, (2, 40, 50, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    two = [Image.fromarray(image) for image in pixels]
    for seed in range(50):  # random models often answer alike whatever they are given, which would test nothing
        base = LlavaForConditionalGeneration.from_pretrained(own_base)
        torch.manual_seed(seed)
        model = shake(add_fwd2bot(base, settings(nested_k=[1, 2, 4]), processor), seed=seed).eval()
        found = [by_hand(model, processor, QUESTION, two[:n]) for n in (1, 2)]
        found.append(by_hand(model, processor, QUESTION, two[:1], num_tokens=2))
        with model.fwd2bot_disabled():
            found.append(by_hand(model, processor, QUESTION, two[:1]))
        if found[0] not in found[1:] and len(found[0].split()) > 2:
            return model
    raise AssertionError("no toy answers one image otherwise than two images, two tokens and dense tokens")


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (3, 40, 50, 3), generator=generator).byte().numpy()
    return [Image.fromarray(image) for image in pixels]


def by_hand(model, processor, question, images, **options):
    prompt = ConversationFormatter(processor).prompt(question, len(images))
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    ids = model.generate(**inputs, **SHORT, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def summaries(model, processor, images):
    return model.compress(processor.image_processor(images=images, return_tensors="pt")["pixel_values"])


def test_it_is_what_one_writes_by_hand(speaker, processor, pictures, tmp_path):
    """The call must be the documented steps and nothing else: template, placeholders, greedy decoding, slicing."""
    expected = by_hand(speaker, processor, QUESTION, pictures[:1])
    assert expected and answer(speaker, processor, QUESTION, pictures[0], **SHORT) == expected
    pictures[0].save(tmp_path / "a.png")
    assert answer(speaker, processor, QUESTION, tmp_path / "a.png", **SHORT) == expected
    both = answer(speaker, processor, QUESTION, pictures[:2], **SHORT)
    assert both == by_hand(speaker, processor, QUESTION, pictures[:2]) != expected
    two = answer(speaker, processor, QUESTION, pictures[0], k=2, **SHORT)
    assert two == by_hand(speaker, processor, QUESTION, pictures[:1], num_tokens=2) != expected
    with speaker.fwd2bot_disabled():
        dense = by_hand(speaker, processor, QUESTION, pictures[:1])
    assert answer(speaker, processor, QUESTION, pictures[0], base=True, **SHORT) == dense != expected


def test_batches(speaker, processor, pictures):
    """Answers stand in the order of the questions, whatever the batch, the number of images or who shares them."""
    questions = [QUESTION, "what is it", "which is larger", "say something"]
    rows = [pictures[0], [pictures[1]], pictures[1:], []]
    single = [
        answer(speaker, processor, q, None if r == [] else r, **SHORT) for q, r in zip(questions, rows, strict=True)
    ]
    for batch_size in (1, 3, 8):
        assert answer(speaker, processor, questions, rows, batch_size=batch_size, **SHORT) == single
    shared = [answer(speaker, processor, q, pictures[0], **SHORT) for q in questions]
    assert answer(speaker, processor, questions, pictures[0], **SHORT) == shared
    dense = [answer(speaker, processor, q, pictures[0], base=True, **SHORT) for q in questions]
    assert answer(speaker, processor, questions, pictures[0], base=True, **SHORT) == dense


def test_an_image_that_several_ask_about_is_compressed_once(speaker, processor, pictures, monkeypatch):
    """Compress once, ask often, is what the method is for."""
    seen, compress = [], speaker.compress
    monkeypatch.setattr(speaker, "compress", lambda *args, **kw: seen.append(kw["pixel_values"]) or compress(**kw))
    answer(speaker, processor, ["a", "b", "c"], pictures[0], **SHORT)
    assert [len(pixels) for pixels in seen] == [1]


def test_stored_summaries(speaker, processor, pictures, monkeypatch):
    """The answers are those of the images, without the vision tower, in every form a summary may come in."""
    stored = summaries(speaker, processor, pictures)  # [3, k, D]
    questions = [QUESTION, "what is it", "which is larger"]
    each = answer(speaker, processor, questions, pictures, **SHORT)
    pair = answer(speaker, processor, QUESTION, pictures[:2], **SHORT)
    one = answer(speaker, processor, questions, pictures[0], **SHORT)
    two = answer(speaker, processor, questions, pictures, k=2, **SHORT)
    monkeypatch.setattr(type(speaker), "_dense_tokens", lambda *args, **kw: pytest.fail("the vision tower ran"))
    assert answer(speaker, processor, questions, summary=stored, **SHORT) == each
    assert answer(speaker, processor, questions, summary=list(stored), **SHORT) == each
    assert answer(speaker, processor, QUESTION, summary=stored[0], **SHORT) == each[0]
    assert answer(speaker, processor, QUESTION, summary=stored[:2], **SHORT) == pair
    assert answer(speaker, processor, questions, summary=stored[0], **SHORT) == one
    assert answer(speaker, processor, questions, summary=stored, k=2, **SHORT) == two != each


def test_streaming(speaker, processor, pictures, capsys):
    """Pieces arrive while the answer is generated, and join to the answer; a streamer of transformers works too."""
    expected = answer(speaker, processor, QUESTION, pictures[0], **SHORT)
    pieces = list(answer(speaker, processor, QUESTION, pictures[0], stream=True, **SHORT))
    assert len(pieces) > 1 and "".join(pieces).strip() == expected
    dense = answer(speaker, processor, QUESTION, pictures[0], base=True, **SHORT)
    assert "".join(answer(speaker, processor, QUESTION, pictures[0], base=True, stream=True, **SHORT)).strip() == dense
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert answer(speaker, processor, QUESTION, pictures[0], streamer=streamer, **SHORT) == expected
    assert capsys.readouterr().out.strip() == expected


def test_a_stream_that_fails_or_is_left(speaker, processor, pictures, monkeypatch):
    """An error in the thread must reach the reader; a reader who leaves must not leave a thread that generates on."""
    left = answer(speaker, processor, QUESTION, pictures[0], stream=True, max_new_tokens=2000)
    next(left)
    left.close()
    steps = []
    monkeypatch.setattr(type(speaker), "generate", lambda *args, **kw: steps.append(1) or {}["broken"])
    with pytest.raises(KeyError, match="broken"):
        list(answer(speaker, processor, QUESTION, pictures[0], stream=True, **SHORT))
    assert steps == [1]


def test_a_llava_without_fwd2bot(own_base, processor, pictures):
    """A plain LoRA run, or the base itself, is asked by the same call."""
    base = LlavaForConditionalGeneration.from_pretrained(own_base).eval()
    assert answer(base, processor, QUESTION, pictures[0], **SHORT) == by_hand(base, processor, QUESTION, pictures[:1])
    for given in ({"k": 2}, {"summary": torch.zeros(4, 64)}):
        with pytest.raises(ValueError, match="This model has no Fwd2Bot: leave out"):
            answer(base, processor, QUESTION, **given)


def test_errors_in_words(speaker, processor, pictures):
    """Each says what does not fit, and what to give instead; the model is not run."""
    stored = torch.zeros(1, 4, 64)
    for question, given, message in (
        ("", {"images": pictures[0]}, "the question is empty"),
        (" <image>\n", {"images": pictures[0]}, "the question is empty"),
        (["a", " "], {"images": pictures[0]}, "question 1 is empty"),
        ([], {"images": pictures[0]}, "There is no question"),
        ([3], {"images": pictures[0]}, "question 0 must be a text, got int"),
        ("a <image> b <image>", {"images": pictures[0]}, "holds 2 <image>, and 1 image"),
        ("a <image>", {}, "holds 1 <image>, and 0 image"),
        (["a", "b"], {"images": pictures}, "2 questions and 3 images"),
        (["a", "b"], {"summary": stored}, "2 questions and 1 summaries.*or a single one, as .k, D., for all"),
        ("a", {"summary": stored, "images": pictures[0]}, "either images or summary"),
        ("a", {"summary": stored[..., :10]}, r"A summary is \[k, 64\]"),
        ("a", {"summary": stored[:, :2], "k": 4}, "hold 2 tokens per image, but k = 4"),
        (["a", "b"], {"summary": [stored[0], stored[0, :2]]}, r"hold \[2, 4\] tokens"),
        ("a", {"summary": stored, "base": True}, "base=True answers from dense tokens: leave out summary"),
        ("a", {"images": pictures[0], "k": 5}, "from 1 to this model's k = 4, got 5"),
        ("a", {"images": 7}, "a PIL image, got int"),
        ("a", {"images": [7]}, "a PIL image, got int"),
        ("a", {"images": "nowhere.png"}, "no such file"),
        ("a", {"images": "https://example.org/a.png"}, "https://example.org/a.png: URLs are not fetched"),
        (["a"], {"images": pictures[0], "stream": True}, "stream=True takes one question"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(speaker, processor, question, **given)


def test_a_prompt_with_the_template_is_refused(speaker, processor, pictures):
    """A template within the template gives an empty or a foolish answer, without a word."""
    prompt = ConversationFormatter(processor).prompt(QUESTION, 1)
    with pytest.raises(ValueError, match="give it without the chat template"):
        answer(speaker, processor, prompt, pictures[0])


def test_an_empty_answer_is_told(speaker, processor, pictures):
    """An empty string looks like an answer."""
    ends = {"max_new_tokens": 1, "suppress_tokens": [i for i in range(speaker.lm_head.out_features) if i != 2]}
    with pytest.warns(UserWarning, match="1 of 1 answer.* are empty, the first to 'what is it'"):
        assert answer(speaker, processor, "what is it", pictures[0], **ends) == ""
    with pytest.warns(UserWarning, match="are empty"):
        assert list(answer(speaker, processor, "what is it", pictures[0], stream=True, **ends)) == []


def test_a_k_that_was_not_trained_is_told(speaker, processor, pictures):
    """Three tokens of a model that was trained with 1, 2 and 4 answer, but not as well as one may think."""
    with pytest.warns(UserWarning, match="k = 3 was not trained: this model was trained with k = 1, 2, 4"):
        answer(speaker, processor, QUESTION, pictures[0], k=3, **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(speaker, processor, QUESTION, pictures[0], k=2, **SHORT)
        answer(speaker, processor, QUESTION, pictures[0], k=4, **SHORT)
