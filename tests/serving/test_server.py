"""The server's answers, asked for by OpenAI's own client: each is the model's own, alone or among others."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from server_toys import *  # noqa: F403
from server_toys import QUESTION, SummaryCache, asking, file_bytes, part, pixels, uri

from llava_fwd2bot import answer
from llava_fwd2bot.bottleneck import embed
from llava_fwd2bot.processing.generate import summaries_of

SHORT = {"model": "toy", "max_tokens": 8}


def test_answer_from_an_image_is_the_models_own(server, loaded):
    """The prompt, the picture's preparation and the summary must be those of `answer`, or figures would not hold."""
    expected = answer(*loaded, QUESTION, pixels(0), max_new_tokens=8)
    url = uri(file_bytes(pixels(0)))
    first, again = (server.openai.chat.completions.create(messages=asking(QUESTION, url), **SHORT) for _ in range(2))
    assert first.choices[0].message.content == again.choices[0].message.content == expected
    assert (first.choices[0].finish_reason, first.usage.completion_tokens) == ("length", 8)
    # the second time no compress pass is run
    assert [r.usage.prompt_tokens_details.cached_tokens for r in (first, again)] == [0, 4]


def test_answer_from_a_cache(server, loaded, cached):
    """Also by the cache's name, and from fewer tokens."""
    stored = SummaryCache.open(cached)
    for k in (None, 2):
        expected = answer(*loaded, QUESTION, summary=stored.get(["beach/c.png"], k), max_new_tokens=8)
        for url in ("cache://beach/c.png", "cache://pets.cache/beach/c.png"):
            asked = {**SHORT, "extra_body": {"k": k}}
            given = server.openai.chat.completions.create(messages=asking(QUESTION, url), **asked)
            assert given.choices[0].message.content == expected
            assert given.usage.prompt_tokens_details.cached_tokens == (k or 4)


def test_several_images_and_a_conversation(server, loaded, cached, processor):
    """Images stand where they were sent, and earlier turns before the question."""
    stored = SummaryCache.open(cached).get(["a.png", "b.png"])
    expected = answer(*loaded, QUESTION, summary=stored, max_new_tokens=8)
    given = server.openai.chat.completions.create(messages=asking(QUESTION, "cache://a.png", "cache://b.png"), **SHORT)
    assert given.choices[0].message.content == expected
    turns = [*asking("what is this", "cache://a.png"), {"role": "assistant", "content": "a dog"}]
    turns += [{"role": "user", "content": "and its colour"}]
    talk = server.openai.chat.completions.create(messages=turns, **SHORT)
    from llava_fwd2bot.processing.conversation import ConversationFormatter
    from llava_fwd2bot.processing.generate import from_summaries

    asked = [("human", "<image>\nwhat is this"), ("gpt", "a dog"), ("human", "and its colour")]
    prompt = ConversationFormatter(loaded[1]).ask([{"from": who, "value": text} for who, text in asked])
    assert talk.choices[0].message.content == from_summaries(*loaded, [prompt], stored[:1], max_new_tokens=8)[0]


def test_a_system_message_stands_before_the_first_question(server):
    """The model's template has one system text of its own; what a client says must not be dropped in silence."""
    system = {"role": "system", "content": "answer in one word"}
    one = server.openai.chat.completions.create(messages=[system, *asking(QUESTION, "cache://a.png")], **SHORT)
    same = asking(f"answer in one word\n{QUESTION}", "cache://a.png")
    other = server.openai.chat.completions.create(messages=same, **SHORT)
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.usage.prompt_tokens == other.usage.prompt_tokens


def test_streamed_pieces_are_the_answer(server):
    """With the end's reason, and the usage where it is asked for."""
    messages = asking(QUESTION, "cache://a.png")
    whole = server.openai.chat.completions.create(messages=messages, **SHORT)
    stream = server.openai.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **SHORT
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_the_base_beside_it(server, loaded):
    """From dense tokens, of which the usage tells."""
    expected = answer(*loaded, QUESTION, pixels(0), base=True, max_new_tokens=8)
    given = server.openai.chat.completions.create(
        model="toy:base", messages=asking(QUESTION, uri(file_bytes(pixels(0)))), max_tokens=8
    )
    assert given.choices[0].message.content == expected
    by_summary = server.openai.chat.completions.create(messages=asking(QUESTION, "cache://a.png"), **SHORT)
    assert given.usage.prompt_tokens == by_summary.usage.prompt_tokens + 16 - 4


def test_many_at_once_each_as_alone(server, loaded, cached):
    """Questions of different lengths, k, images and ends share batches: none may change another's answer."""
    stored = SummaryCache.open(cached)
    names = ["a.png", "b.png", "beach/c.png", "beach/d.png"]
    asks = []
    for i in range(40):
        ids = [names[(i + j) % 4] for j in range(i % 3)]
        question = " ".join([QUESTION] * (1 + i % 4)) + f" {i}"
        asks.append((ids, question, 1 + i % 4, 3 + i % 9))

    def ask(asked):
        ids, question, k, most = asked
        given = server.openai.chat.completions.create(
            messages=asking(question, *(f"cache://{name}" for name in ids)),
            model="toy",
            max_tokens=most,
            extra_body={"k": k},
        )
        return given.choices[0].message.content

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, asks))
    for text, (ids, question, k, most) in zip(found, asks, strict=True):
        summary = stored.get(ids, k) if ids else None
        assert text == answer(*loaded, question, summary=summary, max_new_tokens=most)
    assert len(set(found)) > 15
    text = server.http.get("/metrics").text
    batches, jobs = (
        float(
            next(
                line.split()[1]
                for line in text.splitlines()
                if line.startswith(f'fwd2bot_batch_size_{what}{{kind="answer"')
            )
        )
        for what in ("count", "sum")
    )
    assert jobs / batches > 1.5, "nothing was batched"


def test_sampling_is_by_seed_and_by_nothing_else(server):
    """A seed gives the same answer again, whoever else is asking; another seed another one."""

    def ask(seed):
        given = server.openai.chat.completions.create(
            messages=asking(QUESTION, "cache://a.png"),
            temperature=1.5,
            top_p=0.95,
            seed=seed,
            model="toy",
            max_tokens=12,
        )
        return given.choices[0].message.content

    alone = ask(1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, [1, 2, 3, 1, 4, 5, 6, 1]))
    assert found[0] == found[3] == found[7] == alone
    assert len(set(found)) > 3


def test_a_stop_ends_the_answer(server):
    """Without the text that ended it, streamed or not."""
    messages = asking(QUESTION, "cache://a.png")
    whole = server.openai.chat.completions.create(messages=messages, model="toy", max_tokens=12)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    expected = text[: text.find(stop)].strip()
    assert expected
    cut = server.openai.chat.completions.create(messages=messages, model="toy", max_tokens=12, stop=stop)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (expected, "stop")
    stream = server.openai.chat.completions.create(
        messages=messages, stream=True, max_tokens=12, stop=[stop], model="toy"
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream).strip() == expected


def test_embeddings_of_texts_and_images(server, loaded):
    """OpenAI's client asks for base64 and decodes it; the vectors are the model's own, and of unit length."""
    model, processor = loaded
    given = server.openai.embeddings.create(model="toy", input=["a dog", "a red car on a road"])
    for text, found in zip(["a dog", "a red car on a road"], given.data, strict=True):
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(found.embedding), model.embed_text(ids)[0], atol=1e-5, rtol=1e-4)
    url = uri(file_bytes(pixels(0)))
    expected = embed(summaries_of(model, processor, [pixels(0)]), "mean")[0]
    for body in ({"input": [part(url)]}, {"messages": [{"role": "user", "content": [part(url)]}]}):
        found = server.http.post("/v1/embeddings", json={"model": "toy", **body}).json()["data"][0]["embedding"]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)
        assert math.isclose(sum(x * x for x in found), 1, rel_tol=1e-4)


def test_search_by_words_image_and_id(server):
    """The picture itself is the best hit, by any way to it; a filter is obeyed."""
    for query in ({"id": "b.png"}, {"image": uri(file_bytes(pixels(1)))}, {"image": "cache://pets.cache/b.png"}):
        found = server.http.post("/v1/search", json={**query, "top": 2}).json()["data"]
        assert found[0]["id"] == "b.png" and found[0]["score"] > 0.999 and len(found) == 2
        assert found[0]["url"] == "cache://pets.cache/b.png" and "source" not in found[0]
    words = server.http.post("/v1/search", json={"query": "a dog", "filter": "id LIKE 'beach/%'", "rerank": True})
    assert {hit["id"] for hit in words.json()["data"]} == {"beach/c.png", "beach/d.png"}


def test_models_health_metrics_and_thumbnails(server):
    """What a monitor and a client read first."""
    assert [model.id for model in server.openai.models.list()] == ["toy", "toy:base"]
    assert server.openai.models.retrieve("toy").id == "toy"
    assert server.http.get("/health").json()["images"] == {"pets.cache": 4}
    server.openai.chat.completions.create(messages=asking(QUESTION, "cache://a.png"), **SHORT)
    text = server.http.get("/metrics").text
    for name in (
        "fwd2bot_time_to_first_token_seconds_count",
        "fwd2bot_requests_waiting",
        "fwd2bot_cached_tokens_total",
    ):
        assert name in text
    assert 'fwd2bot_requests_total{path="/v1/chat/completions",status="200"}' in text
    small = server.http.get("/v1/thumbnails/beach/c.png")
    assert small.headers["content-type"] == "image/jpeg" and small.content[:2] == b"\xff\xd8"
    assert server.http.get("/v1/images/beach/c.png").json()["width"] == 50


def test_look_gives_a_map_for_each_summary_token(server):
    """Shares of attention: at most 1 in all."""
    found = server.http.post("/v1/look", json={"image": uri(file_bytes(pixels(0))), "k": 3}).json()
    assert (found["k"], found["grid"]) == (3, [4, 4])
    assert all(0 < sum(map(sum, one)) <= 1 for one in found["maps"])


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_that_loads_scripts_of_others(server, path):
    """FastAPI's own documentation pages load scripts from the web."""
    assert server.http.get(path).status_code == 404
