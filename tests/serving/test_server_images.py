"""Images that are added and taken out over HTTP: each whole or not at all, and found by whoever asks next."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from server_toys import *  # noqa: F403
from server_toys import QUESTION, SummaryCache, app_of, asking, file_bytes, listening, pixels, refused, uri

from llava_fwd2bot.cache.verify import verify
from llava_fwd2bot.processing.generate import summaries_of


@pytest.fixture
def place(loaded, cached, checkpoint, tmp_path):
    """A server over a copy of the cache, and the copy."""
    shutil.copytree(cached, tmp_path / "pets.cache")
    with listening(app_of(loaded, checkpoint, tmp_path / "pets.cache")) as server:
        yield server, tmp_path / "pets.cache"


def test_an_image_is_added_asked_about_found_and_taken_out(place, loaded):
    """What is stored is what `compress` stores, and other processes see it."""
    server, path = place
    data = file_bytes(pixels(9))
    found = server.http.post("/v1/images", json={"id": "new/e.png", "image": uri(data)})
    assert found.status_code == 201 and found.json()["compressed"]
    assert found.json()["url"] == "cache://pets.cache/new/e.png" and found.json()["width"] == 50
    expected = summaries_of(*loaded, [pixels(9)])[0]
    torch.testing.assert_close(SummaryCache.open(path).get(["new/e.png"])[0], expected, atol=1e-2, rtol=1e-2)
    assert server.http.post("/v1/search", json={"image": uri(data), "top": 1}).json()["data"][0]["id"] == "new/e.png"
    answer = server.openai.chat.completions.create(model="toy", messages=asking(QUESTION, "cache://new/e.png"))
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    refused(server.http.get("/v1/thumbnails/new/e.png"), 404, "no_file")
    assert server.http.delete("/v1/images/new/e.png").json()["deleted"]
    refused(server.http.delete("/v1/images/new/e.png"), 404, "image_not_found")
    refused(server.http.get("/v1/images/new/e.png"), 404, "image_not_found")
    assert verify(SummaryCache.open(path))["ok"]


def test_the_same_picture_again_is_not_compressed(place):
    """Summaries are of contents: another name costs one row, and the same name is replaced."""
    server, path = place
    same = uri(file_bytes(pixels(0)))
    found = server.http.post("/v1/images", json={"id": "copy.png", "image": same})
    assert found.status_code == 201 and not found.json()["compressed"]
    again = server.http.post("/v1/images", json={"id": "copy.png", "image": uri(file_bytes(pixels(7)))})
    assert again.status_code == 200 and again.json()["sha256"] != found.json()["sha256"]
    assert len(SummaryCache.open(path)) == 5


def test_an_id_of_a_file_is_not_taken(place):
    """`cache://a.png` must go on to mean the file that `compress` found."""
    server, path = place
    refused(server.http.post("/v1/images", json={"id": "a.png", "image": uri(file_bytes(pixels(7)))}), 409, "id_taken")
    assert len(SummaryCache.open(path)) == 4


def test_many_are_added_at_once(place):
    """From many clients: none is lost, none is there twice."""
    server, path = place

    def add(i):
        return server.http.post("/v1/images", json={"id": f"many/{i}", "image": uri(file_bytes(pixels(100 + i % 12)))})

    with ThreadPoolExecutor(8) as pool:
        assert {found.status_code for found in pool.map(add, range(16))} == {201}
    cache = SummaryCache.open(path)
    assert len(cache) == 20 and verify(cache)["ok"]


def test_a_cache_of_quantised_summaries_is_not_added_to(place, loaded, cached, checkpoint):
    """A collection in which some summaries were made otherwise would answer worse, and nobody would know why."""
    from llava_fwd2bot.cache.naming import fingerprint_of
    from llava_fwd2bot.serving.app import create_app
    from llava_fwd2bot.serving.caches import Caches

    caches = Caches([str(cached)], fingerprint_of(checkpoint), quantised="4bit")
    with listening(create_app(*loaded, "toy", caches=caches)) as server:
        body = {"id": "x", "image": uri(file_bytes(pixels(7)))}
        refused(server.http.post("/v1/images", json=body), 409, "cache_read_only")


def test_a_server_without_a_cache(loaded, checkpoint):
    """It answers about images that are sent; what needs a cache says so."""
    with listening(app_of(loaded, checkpoint)) as server:
        url = uri(file_bytes(pixels(0)))
        assert server.openai.chat.completions.create(model="toy", messages=asking(QUESTION, url)).choices
        refused(server.http.post("/v1/search", json={"query": "a dog"}), 404, "no_cache")
        refused(server.http.post("/v1/images", json={"id": "x", "image": url}), 404, "no_cache")
        body = {"messages": asking(QUESTION, "cache://x")}
        refused(server.http.post("/v1/chat/completions", json=body), 404, "no_cache")


def test_an_id_in_two_caches(loaded, cached, checkpoint, tmp_path):
    """One picture, or two of one name: then the cache must be said."""
    for name in ("one.cache", "two.cache"):
        shutil.copytree(cached, tmp_path / name)
    with listening(app_of(loaded, checkpoint, tmp_path / "one.cache", tmp_path / "two.cache")) as server:

        def ask(url):
            body = {"messages": asking(QUESTION, url), "max_tokens": 2}
            return server.http.post("/v1/chat/completions", json=body)

        assert ask("cache://a.png").status_code == 200  # the same picture in both
        for cache, seed in (("one.cache", 21), ("two.cache", 22)):
            body = {"id": "x", "cache": cache, "image": uri(file_bytes(pixels(seed)))}
            assert server.http.post("/v1/images", json=body).status_code == 201
        error = refused(ask("cache://x"), 409, "ambiguous_id")
        assert "cache://one.cache/x" in error["message"] and ask("cache://two.cache/x").status_code == 200
        assert server.http.delete("/v1/images/x", params={"cache": "two.cache"}).status_code == 200
        assert ask("cache://x").status_code == 200
        refused(server.http.post("/v1/search", json={"query": "a", "cache": "third"}), 404, "cache_not_found")
