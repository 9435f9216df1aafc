"""Bad input and bad luck: each has its status and OpenAI's form of an error, and takes nothing else with it."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from server_toys import *  # noqa: F403
from server_toys import CHAT, GOOD, QUESTION, app_of, asking, chat, file_bytes, listening, part, pixels, refused, uri

from llava_fwd2bot import Fwd2BotConfig
from llava_fwd2bot.processing.batched import Answer
from llava_fwd2bot.serving.errors import APIError
from llava_fwd2bot.serving.limits import Limits
from llava_fwd2bot.serving.service import Service

openai = pytest.importorskip("openai")

IMAGE = uri(file_bytes(pixels(0)))


def bomb() -> bytes:
    """A PNG of 60,000 × 60,000 pixels in some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (chat(k=5), 400, "k_too_large"),
        (chat(k=0), 400, "invalid_request"),
        (chat(model="gpt-9"), 404, "model_not_found"),
        (chat(messages=asking(QUESTION, "cache://nowhere.png")), 404, "image_not_found"),
        (chat(messages=asking(QUESTION, uri(bomb()))), 400, "invalid_image"),
        (chat(messages=asking(QUESTION, uri(b"no picture at all"))), 400, "invalid_image"),
        (chat(messages=asking(QUESTION, uri(file_bytes(pixels(0))[:200]))), 400, "invalid_image"),
        (chat(messages=asking(QUESTION, uri(b""))), 400, "invalid_image"),
        (chat(messages=asking(QUESTION, "data:image/png;base64,@@@@")), 400, "invalid_value"),
        (chat(messages=asking(QUESTION, "data:image/png,abc")), 400, "invalid_value"),
        (chat(messages=asking(QUESTION, "http://169.254.169.254/latest/meta-data")), 403, "url_not_allowed"),
        (chat(messages=asking(QUESTION, "file:///etc/passwd")), 400, "invalid_value"),
        (chat(messages=asking(QUESTION, "/etc/passwd")), 400, "invalid_value"),
        (chat(messages=asking(QUESTION, *[IMAGE] * 9)), 400, "too_many_images"),
        (chat(messages=asking("", IMAGE)), 400, "empty_message"),
        (chat(messages=asking("where is <image> here", IMAGE)), 400, "invalid_value"),
        (chat(messages=[{"role": "user", "content": "dog " * 10_000}]), 400, "context_length_exceeded"),
        (chat(messages=[{"role": "user", "content": "dog " * 1_000_000}]), 400, "context_length_exceeded"),
        (chat(messages=[]), 400, "invalid_request"),
        (chat(messages=[{"role": "user", "content": " "}]), 400, "empty_message"),
        (chat(messages=[{"role": "assistant", "content": "hello"}]), 400, "invalid_value"),
        (chat(messages=[*GOOD["messages"], {"role": "assistant", "content": "hello"}]), 400, "invalid_value"),
        (chat(messages=[{"role": "tool", "content": "x"}]), 400, "invalid_request"),
        (chat(messages=[{"role": "user", "content": "\ud800"}]), 400, None),
        (chat(max_tokens=100_000), 400, "invalid_value"),
        (chat(temperature=-1), 400, "invalid_request"),
        (chat(n=2), 400, "invalid_request"),
        (chat(tools=[{"type": "function"}]), 400, "invalid_request"),
        (chat(logprobs=True), 400, "invalid_request"),
        (chat(temperature="1"), 400, "invalid_request"),
        (chat(stream=0, messages=[]), 400, "invalid_request"),
        (chat(temperatur=1), 400, "invalid_request"),
        (chat(min_tokens=3), 400, "invalid_value"),
        (chat(stop=[""]), 400, "invalid_value"),
        (chat(model="toy:base", messages=asking(QUESTION, "cache://a.png")), 400, "invalid_value"),
        (chat(model="toy:base", k=1, messages=asking(QUESTION, IMAGE)), 400, "invalid_value"),
    ],
)
def test_a_bad_question(server, body, status, code):
    """Told before the model works, with the field that is wrong, streamed or not; the next question is answered."""
    content = json.dumps(body)
    for text in (content, content[:-1] + ', "stream": true}'):
        refused(server.http.post(CHAT, content=text, headers={"Content-Type": "application/json"}), status, code)
    assert server.http.post(CHAT, json=GOOD).status_code == 200


def test_stream_options_go_with_a_stream(server):
    """As OpenAI's own server has it."""
    refused(server.http.post(CHAT, json=chat(stream_options={"include_usage": True})), 400, "invalid_value")


def test_openais_client_raises_its_own_errors(server):
    """By the status code it knows which; the message and the code are ours."""
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.chat.completions.create(model="toy", messages=asking(QUESTION, "cache://z.png"))
    assert error.value.code == "image_not_found" and "z.png" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        server.openai.chat.completions.create(model="toy", messages=asking(QUESTION), temperature=9)
    assert error.value.param == "temperature"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {}, 400),
        ("/v1/embeddings", {"input": ""}, 400),
        ("/v1/embeddings", {"input": []}, 400),
        ("/v1/embeddings", {"input": [1, 2, 3]}, 400),
        ("/v1/embeddings", {"input": "a dog", "dimensions": 3}, 400),
        ("/v1/embeddings", {"input": "dog " * 1000}, 400),
        ("/v1/embeddings", {"input": ["a"] * 65}, 400),
        ("/v1/embeddings", {"input": "a dog", "model": "toy:base"}, 400),
        ("/v1/search", {}, 400),
        ("/v1/search", {"query": "a", "id": "b"}, 400),
        ("/v1/search", {"query": "a dog", "top": 101}, 400),
        ("/v1/search", {"query": "a dog", "top": 2**70}, 400),
        ("/v1/search", {"query": "a dog", "filter": "no such column = 1"}, 400),
        ("/v1/search", {"query": "a dog", "filter": "repeat('a', 9999999999) = id"}, 400),
        ("/v1/search", {"query": "a dog", "filter": "\0"}, 400),
        ("/v1/search", {"query": "a dog", "cache": "other"}, 404),
        ("/v1/search", {"id": "nowhere"}, 404),
        ("/v1/images", {"image": IMAGE, "id": "../up"}, 400),
        ("/v1/images", {"image": IMAGE, "id": ""}, 400),
        ("/v1/images", {"image": IMAGE, "id": "a\nb"}, 400),
        ("/v1/images", {"image": "cache://a.png", "id": "x"}, 400),
        ("/v1/images", {"image": uri(bomb()), "id": "x"}, 400),
        ("/v1/images", {"image": IMAGE, "id": "x", "cache": "other"}, 404),
        ("/v1/look", {"image": IMAGE, "k": 9}, 400),
        ("/v1/nothing", {}, 404),
        ("/health", {}, 405),
    ],
)
def test_other_bad_requests(server, path, body, status):
    """Every route answers in one form, also where there is none."""
    refused(server.http.post(path, json=body), status)
    assert server.http.get("/health").json()["images"] == {"pets.cache": 4}


def test_methods_that_a_path_has(server):
    """All of them, where several routes share the path."""
    found = server.http.post("/v1/images/a.png")
    refused(found, 405)
    assert found.headers["allow"] == "DELETE, GET"


def test_what_is_no_json(server):
    """Also bytes that are no text at all."""
    for content in (b"{", b"\xff\xfe", b"[]", b"", b'{"messages": NaN}'):
        refused(server.http.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400)


def test_a_form_of_another_site_is_no_request(server):
    """A page of the web may send text/plain to this machine without being asked; it must not be read as JSON."""
    refused(server.http.post(CHAT, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}), 400)


def test_pictures_of_every_kind_are_read_or_refused(server):
    """A JPEG of a camera lies on its side; formats that run programs are not opened."""
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels(0).save(turned, "JPEG", exif=exif)
    assert server.http.post(CHAT, json=chat(messages=asking(QUESTION, uri(turned.getvalue())))).status_code == 200
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    refused(server.http.post(CHAT, json=chat(messages=asking(QUESTION, uri(postscript)))), 400, "invalid_image")
    thin = file_bytes(Image.new("RGB", (1, 40_000)))  # becomes huge as its shorter side is made 32
    assert server.http.post(CHAT, json=chat(messages=asking(QUESTION, uri(thin)))).status_code in (200, 400)


# ---------------------------------------------------------------------- limits
def test_limits_of_bytes(loaded, checkpoint):
    """Of the body, also where its header does not say; and of one image."""
    limits = Limits(body_bytes=20_000, image_bytes=5_000)
    with listening(app_of(loaded, checkpoint, limits=limits)) as server:
        refused(server.http.post(CHAT, json=chat(user="x" * 30_000)), 413, "request_too_large")
        parts = iter([b'{"user": "', *[b"x" * 5_000] * 6, b'"}'])
        refused(server.http.post(CHAT, content=parts), 413, "request_too_large")
        refused(server.http.post(CHAT, json=chat(messages=asking("a", uri(b"x" * 6_000)))), 413, "image_too_large")
        assert server.http.post(CHAT, json=GOOD).status_code == 200


def test_a_full_queue_and_a_timeout(loaded, checkpoint):
    """Those that wait are answered, the next is told to come again; a request that takes too long ends, and frees its
    place."""
    limits = Limits(queue=2, batch=1, seconds=2, new_tokens=1500)
    with listening(app_of(loaded, checkpoint, limits=limits)) as server, ThreadPoolExecutor(8) as pool:
        long = [pool.submit(server.http.post, CHAT, json=chat(max_tokens=1500)) for _ in range(6)]
        codes = sorted(future.result().status_code for future in long)
        assert codes.count(429) >= 3 and set(codes) <= {200, 429, 504}
        until = time.monotonic() + 30  # a request that took too long frees its place at its next token
        while (code := server.http.post(CHAT, json=GOOD).status_code) == 429 and time.monotonic() < until:
            time.sleep(0.2)
        assert code == 200
        busy = next(f.result() for f in long if f.result().status_code == 429)
        assert refused(busy, 429, "server_busy")["type"] == "rate_limit_error" and busy.headers["retry-after"] == "1"
    with listening(app_of(loaded, checkpoint, limits=Limits(seconds=0.2, new_tokens=1500))) as server:
        refused(server.http.post(CHAT, json=chat(max_tokens=1500)), 504, "timeout")
        text = server.http.post(CHAT, json=chat(max_tokens=1500, stream=True)).text
        assert '"code": "timeout"' in text and "[DONE]" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(loaded, checkpoint, monkeypatch, stream):
    """With room for one request, the next one is answered long before the first would have ended."""
    taken: list[int] = []
    take = Answer.take
    monkeypatch.setattr(Answer, "take", lambda self, token, ends: (taken.append(token), take(self, token, ends)))
    with listening(app_of(loaded, checkpoint, limits=Limits(batch=1, new_tokens=1500))) as server:
        body = chat(max_tokens=1500, stream=stream)
        if stream:
            with server.http.stream("POST", CHAT, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}{CHAT}", json=body, timeout=0.5)
        assert server.http.post(CHAT, json=GOOD).status_code == 200
        assert len(taken) < 1000
        assert server.app.state.service.model.batcher.waiting() == 0


def test_a_long_answer_lets_others_in(loaded, checkpoint):
    """A question of two tokens does not wait for an answer of 1500, which is the same as when it is asked alone."""
    with listening(app_of(loaded, checkpoint, limits=Limits(new_tokens=600))) as server:
        alone = server.http.post(CHAT, json=chat(max_tokens=600)).json()
        done = {}

        def long():
            done["text"] = server.http.post(CHAT, json=chat(max_tokens=600)).json()
            done["at"] = time.monotonic()

        thread = threading.Thread(target=long)
        thread.start()
        time.sleep(0.3)
        assert server.http.post(CHAT, json=chat(messages=asking("and this", IMAGE))).status_code == 200
        short = time.monotonic()
        thread.join()
        assert short < done["at"]
        assert done["text"]["choices"] == alone["choices"]


def test_a_stop_finishes_what_is_in_hand(loaded, checkpoint):
    """SIGTERM sets `should_exit`: the answer that is being streamed comes to its end."""
    with listening(app_of(loaded, checkpoint, limits=Limits(new_tokens=400))) as server:
        with server.http.stream("POST", CHAT, json=chat(max_tokens=400, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.should_exit = True
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        server.thread.join(30)
        assert not server.app.state.service.model.batcher.alive


# ---------------------------------------------------------------------- who may ask
def test_a_token(loaded, checkpoint):
    """Needed by all but the page and /health; the wrong one is told from none."""
    app = app_of(loaded, checkpoint, token="a-long-secret")
    with listening(app, token="a-long-secret") as server:
        assert server.openai.chat.completions.create(model="toy", **GOOD).choices
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic a-long-secret"}):
            for path in (CHAT, "/v1/search", "/v1/images"):
                refused(httpx.post(f"{server.url}{path}", json=GOOD, headers=headers), 401, "invalid_api_key")
            refused(httpx.get(f"{server.url}/metrics", headers=headers), 401)
            refused(httpx.get(f"{server.url}/openapi.json", headers=headers), 401)
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no").models.list()


def test_another_hosts_name_is_refused(server):
    """A page on the web whose name was made to mean 127.0.0.1 must not reach a server without a token."""
    refused(server.http.get("/v1/models", headers={"Host": "evil.example"}), 403, "wrong_host")
    assert server.http.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200


def test_urls_are_fetched_from_hosts_that_are_named(loaded, checkpoint, tmp_path):
    """And a redirect does not lead away from them."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Web(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/a.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(file_bytes(pixels(0)))
            else:
                self.send_response(302)
                self.send_header("Location", "http://localhost:9/a.png")
                self.end_headers()

        def log_message(self, *args):
            pass

    web = HTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{web.server_port}"
    with listening(app_of(loaded, checkpoint, fetch_hosts=["127.0.0.1"])) as server:
        one, other = (
            server.http.post(CHAT, json=chat(messages=asking(QUESTION, u))).json()["choices"]
            for u in (f"{url}/a.png", IMAGE)
        )
        assert one == other
        refused(server.http.post(CHAT, json=chat(messages=asking(QUESTION, f"{url}/away"))), 400, "url_failed")
        other = url.replace("127.0.0.1", "localhost")
        refused(server.http.post(CHAT, json=chat(messages=asking(QUESTION, f"{other}/a.png"))), 403)
    web.shutdown()


def test_parts_must_be_known(server):
    """An audio part that is dropped would be an answer about something else."""
    content = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, part(IMAGE)]
    refused(server.http.post(CHAT, json=chat(messages=[{"role": "user", "content": content}])), 400)


def test_fewer_tokens_of_a_summary_without_prefixes_are_refused():
    """The first tokens of a grid are a corner of the image; answers from them would look like any other."""
    service = SimpleNamespace(k=4, config=Fwd2BotConfig(num_summary_tokens=4, residual="pool"))
    Service.check_k(service, 4)
    with pytest.raises(APIError, match="leave k out") as error:
        Service.check_k(service, 2)
    assert (error.value.status, error.value.code) == (400, "k_without_prefix")
