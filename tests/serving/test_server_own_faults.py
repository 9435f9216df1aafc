"""Faults behind the server: a job that fails, a damaged cache, an engine that dies. Others are still answered."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from server_toys import *  # noqa: F403
from server_toys import CHAT, GOOD, QUESTION, app_of, asking, chat, listening, refused


def test_one_bad_job_does_not_fail_its_batch(loaded, checkpoint, monkeypatch):
    """Where the batch fails, each job runs by itself, and the one at fault is told."""
    from llava_fwd2bot.serving import engine

    own = engine.run

    def run(model, answers, *rest):
        if any("poison" in a.tokenizer.decode(a.ids) for a in answers):
            raise RuntimeError("a fault")
        return own(model, answers, *rest)

    monkeypatch.setattr(engine, "run", run)
    with listening(app_of(loaded, checkpoint)) as server, ThreadPoolExecutor(8) as pool:
        texts = ["hello"] * 4 + ["poison"] + ["hello"] * 3
        bodies = [chat(messages=[{"role": "user", "content": text}]) for text in texts]
        found = list(pool.map(lambda body: server.http.post(CHAT, json=body), bodies))
        assert [r.status_code for r in found] == [500 if text == "poison" else 200 for text in texts]
        error = refused(found[4], 500, "internal_error")
        assert error["type"] == "server_error" and "a fault" not in error["message"]
        assert server.http.get("/health").status_code == 200


def test_a_damaged_cache_is_told(loaded, checkpoint, cached, tmp_path):
    """Not as the client's fault; and other questions are answered."""
    import shutil

    shutil.copytree(cached, tmp_path / "pets.cache")
    with listening(app_of(loaded, checkpoint, tmp_path / "pets.cache")) as server:
        for file in (tmp_path / "pets.cache/summaries.lance/data").iterdir():
            data = bytearray(file.read_bytes())
            data[: len(data) // 2] = bytes(len(data) // 2)
            file.write_bytes(data)
        for _ in range(5):  # the connection is kept: a next request must not be reset
            found = server.http.post(CHAT, json=chat(messages=asking(QUESTION, "cache://a.png")))
            refused(found, 500, "cache_damaged")
            assert server.http.post(CHAT, json=GOOD).status_code == 200


class Dying:
    """An engine that dies after some words."""

    def __init__(self, words: int, closed: list | None = None) -> None:
        self.words, self.closed = words, closed if closed is not None else []
        self.asked: list = []

    def answer(self, question, *, summary, stream, **options):
        self.asked.append((question, None if summary is None else tuple(summary.shape), options))
        try:
            for i in range(self.words):
                yield f"word{i} "
            raise ConnectionError("the engine is gone")
        except GeneratorExit:
            self.closed.append(True)
            raise


def test_an_engine_that_dies(loaded, checkpoint, cached):
    """In the middle of an answer the stream says so; before it, or without a stream, the status does."""
    engine = Dying(0)
    with listening(app_of(loaded, checkpoint, cached, engine=engine)) as server:
        body = chat(messages=asking(QUESTION, "cache://a.png"))
        refused(server.http.post(CHAT, json=body), 502, "engine_failed")
        refused(server.http.post(CHAT, json={**body, "stream": True}), 502, "engine_failed")
        engine.words = 3
        refused(server.http.post(CHAT, json=body), 502, "engine_failed")
        text = server.http.post(CHAT, json={**body, "stream": True}).text
        assert "word2" in text and '"engine_failed"' in text and "[DONE]" not in text
        question, shape, options = engine.asked[-1]
        assert (question, shape) == (QUESTION, (1, 4, 64)) and options["max_new_tokens"] == 2
        assert server.http.get("/health").status_code == 200
        assert [m["id"] for m in server.http.get("/v1/models").json()["data"]] == ["toy"]


def test_an_engine_answers(loaded, checkpoint, cached):
    """Its pieces are the answer; a client that goes away closes them."""

    class Good:
        def answer(self, question, *, summary, stream, **options):
            yield from ("two ", "dogs")

    with listening(app_of(loaded, checkpoint, cached, engine=Good())) as server:
        given = server.openai.chat.completions.create(model="toy", messages=asking(QUESTION, "cache://a.png"))
        assert (given.choices[0].message.content, given.choices[0].finish_reason) == ("two dogs", "stop")
        assert given.usage.completion_tokens > 0
        turns = [*asking(QUESTION), {"role": "assistant", "content": "two"}, *asking("sure")]
        refused(server.http.post(CHAT, json=chat(messages=turns)), 400)
    closed: list = []
    with listening(app_of(loaded, checkpoint, cached, engine=Dying(10**9, closed))) as server:
        with server.http.stream("POST", CHAT, json=chat(stream=True)) as response:
            next(response.iter_lines())
        for _ in range(100):
            if closed:
                break
            time.sleep(0.05)
        assert closed
