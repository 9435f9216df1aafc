"""ask_many(): one image, many questions; each answer is the one that `answer` gives, and the tokens are counted."""

from __future__ import annotations

import pytest
import torch
from conftest import settings, shake, toy_base
from test_answer import pictures, speaker  # noqa: F401

from llava_fwd2bot import add_fwd2bot, answer, ask_many
from llava_fwd2bot.processing.batched import Answer, run
from llava_fwd2bot.processing.conversation import ConversationFormatter, prompt_ids

QUESTIONS = [
    "how many dogs are there",
    "what is it",
    "is it day or night, and where was the picture taken",
    "a cat",
    "why",
]


def test_answers_are_those_of_answer(speaker, processor, pictures):  # noqa: F811
    """Batches of any size, from an image or its summary, from all tokens or the first."""
    for k in (None, 2):
        alone = [answer(speaker, processor, q, pictures[0], k=k, max_new_tokens=8) for q in QUESTIONS]
        assert len(set(alone)) > 2
        for size in (1, 3, 8):
            found = ask_many(speaker, processor, pictures[0], QUESTIONS, k=k, batch_size=size, max_new_tokens=8)
            assert found.answers == alone and found.k == (k or 4)
        pixels = processor.image_processor(images=[pictures[0]], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            summary = speaker.compress(pixels)[0]
        assert ask_many(speaker, processor, summary, QUESTIONS, k=k, max_new_tokens=8).answers == alone


def test_pieces_come_as_they_are_made(speaker, processor, pictures):  # noqa: F811
    """Of the questions of a batch in turn; together they are the answers. Who stops reading stops the model."""
    found = ask_many(speaker, processor, pictures[0], QUESTIONS, max_new_tokens=8)
    texts = [""] * len(QUESTIONS)
    numbers = []
    for number, piece in ask_many(speaker, processor, pictures[0], QUESTIONS, stream=True, max_new_tokens=8):
        texts[number] += piece
        numbers.append(number)
    assert texts == found.answers
    assert numbers != sorted(numbers)
    pieces = ask_many(speaker, processor, pictures[0], QUESTIONS, stream=True, max_new_tokens=1000)
    next(pieces)
    pieces.close()


def test_tokens_are_counted(speaker, processor, pictures):  # noqa: F811
    """n = 16 and k = 4: one question does not pay for its compress pass, five do."""
    prompts = [ConversationFormatter(processor).prompt(q) for q in QUESTIONS]
    words = sum(len(prompt_ids(processor, prompt)["input_ids"][0]) - 1 for prompt in prompts)
    once = 16 + len(speaker.fwd2bot.image_prompt_ids) + 4
    found = ask_many(speaker, processor, pictures[0], QUESTIONS, max_new_tokens=1)
    assert (found.read_tokens, found.base_tokens) == (words + 5 * 4 + once, words + 5 * 16)
    assert found.saved_tokens == 5 * 12 - once
    assert ask_many(speaker, processor, torch.zeros(4, 64), QUESTIONS, max_new_tokens=1).saved_tokens is None


def test_an_id_of_a_cache(checkpoint, processor, photos, tmp_path):
    """Without the image and without a compress pass; n is that of an image of its size."""
    pytest.importorskip("lancedb")
    from llava_fwd2bot import load_fwd2bot
    from llava_fwd2bot.cache.reader import SummaryCache
    from llava_fwd2bot.cli.main import main

    path = tmp_path / "a.cache"
    given = ["compress", "--model", checkpoint, "--images", photos / "a.png", photos / "b.png", "--cache", path]
    assert main([str(word) for word in [*given, "--codec", "float16", "--device", "cpu"]]) == 0
    cache, (model, processor) = SummaryCache.open(path), load_fwd2bot(checkpoint)
    found = ask_many(model, processor, "a.png", QUESTIONS, cache=cache, k=2, max_new_tokens=6)
    summary = cache.get(["a.png"], 2)[0]
    assert found.answers == answer(model, processor, QUESTIONS, summary=summary, max_new_tokens=6)
    assert found.saved_tokens == 5 * (16 - 2)
    with pytest.raises(ValueError, match="has no id 'z.png'"):
        ask_many(model, processor, "z.png", QUESTIONS, cache=cache)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"questions": []}, "at least one"),
        ({"questions": "what"}, "list"),
        ({"questions": ["a", " "]}, "question 1 is empty"),
        ({"k": 5}, "k must be from 1 to this model's k = 4"),
        ({"context": torch.zeros(4, 63)}, r"A summary is \[k, 64\]"),
        ({"context": torch.zeros(1, 64), "k": 2}, "holds 1 tokens"),
        ({"context": "nowhere.png"}, "no such file"),
    ],
)
def test_bad_calls(speaker, processor, changes, told):  # noqa: F811
    """In words, before the model works."""
    given = {"context": torch.zeros(4, 64), "questions": ["a"], **changes}
    with pytest.raises(ValueError, match=told):
        ask_many(speaker, processor, **given)


def answers_of(model, processor, cases, **options):
    formatter = ConversationFormatter(processor)
    return [
        Answer(
            prompt_ids(processor, formatter.prompt(text, len(summaries)))["input_ids"][0],
            summaries,
            processor.tokenizer,
            max_new_tokens=most,
            **options,
        )
        for text, summaries, most in cases
    ]


@pytest.fixture
def lively64(processor):
    """In float64, and not one of the many random models that answer everything alike."""
    for seed in range(100):
        model = shake(add_fwd2bot(toy_base(processor, torch.float64, seed), settings(), processor), seed)
        with torch.inference_mode():
            S = model.compress(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double())
        asked = answers_of(model, processor, [("what", [S[0]], 5), ("what", [S[1]], 5), ("what", [S[1][:2]], 5)])
        run(model, asked)
        if len({tuple(one.tokens) for one in asked}) == 3:
            return model
    raise AssertionError("no toy answers different images differently")


def test_rows_of_a_batch_are_as_alone(lively64, processor):
    """In float64: texts, k, images, lengths and sampling differ by row, and a run that was left goes on as if not."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        S = lively64.compress(pixels)
    cases = [("how many", [S[0]], 12), ("what is it and what colour is it", [S[1][:2]], 5)]
    cases += [("both", [S[0], S[2][:1]], 20), ("hello", [], 9)]
    for options in ({}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}):
        alone = answers_of(lively64, processor, cases, **options)
        for one in alone:
            assert run(lively64, [one]) == []
        for leave in (lambda going, steps: False, lambda going, steps: steps >= 4):
            together = answers_of(lively64, processor, cases, **options)
            rest = run(lively64, together, leave)
            while rest:
                rest = run(lively64, rest, leave)
            assert [one.tokens for one in together] == [one.tokens for one in alone]
            assert [one.text for one in together] == [one.text for one in alone]
        assert len({tuple(one.tokens) for one in alone}) == 4


def test_draws_follow_the_distribution(model, processor):
    """Gumbel noise and top_p: the shares of 4,000 draws are the softmax's, and what top_p leaves out is not drawn."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    one = Answer(torch.tensor([1]), [], processor.tokenizer, temperature=0.7, seed=0)
    drawn = torch.tensor([int(one.draw(scores).argmax()) for _ in range(4000)]).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, (scores / 0.7).softmax(0), atol=0.03, rtol=0)
    one = Answer(torch.tensor([1]), [], processor.tokenizer, temperature=1.0, top_p=0.7, seed=0)
    assert {int(one.draw(scores).argmax()) for _ in range(500)} == {0, 1}


def test_an_answer_ends_where_it_may(lively64, processor):
    """At the end's token, of each row by itself, but not before its `min_new_tokens`."""
    with torch.inference_mode():
        S = lively64.compress(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double())
    [free] = answers_of(lively64, processor, [("what is it", [S[0]], 12)])
    run(lively64, [free])
    end = free.tokens[3]
    lively64.generation_config.eos_token_id = [2, end]
    first = free.tokens.index(end)
    two = answers_of(lively64, processor, [("what is it", [S[0]], 12)] * 2)
    two[1].min_new_tokens = 8
    run(lively64, two)
    assert (two[0].tokens, two[0].reason) == (free.tokens[: first + 1], "stop")
    assert end not in two[1].tokens[:8] and len(two[1].tokens) >= 8
