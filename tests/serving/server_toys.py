"""What the tests of the server share: a toy model with a cache behind a real server, and pictures as data URIs."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

for needed in ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx", "lancedb"):
    pytest.importorskip(needed)

import httpx  # noqa: E402
import openai  # noqa: E402
import torch  # noqa: E402
import uvicorn  # noqa: E402
from conftest import settings, shake  # noqa: E402
from transformers import LlavaForConditionalGeneration  # noqa: E402

from llava_fwd2bot import add_fwd2bot, answer, load_fwd2bot  # noqa: E402
from llava_fwd2bot.cache.compressor import Compressor  # noqa: E402
from llava_fwd2bot.cache.format import CacheSettings  # noqa: E402
from llava_fwd2bot.cache.naming import fingerprint_of  # noqa: E402
from llava_fwd2bot.cache.pipeline import fill  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402
from llava_fwd2bot.files.pixels import OWN  # noqa: E402
from llava_fwd2bot.serving.app import create_app  # noqa: E402
from llava_fwd2bot.serving.caches import Caches  # noqa: E402

QUESTION = "how many dogs are there"
CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def pixels(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3)).astype("uint8"))


def file_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat(**changes: Any) -> dict[str, Any]:
    """A good request, with changes."""
    return {**GOOD, **changes}


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asking(question: str, *urls: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*map(part, urls), {"type": "text", "text": question}]}]


@contextlib.contextmanager
def listening(app: Any, token: str | None = None) -> Iterator[SimpleNamespace]:
    """A real server in a thread: its `url`, an `httpx` client, and OpenAI's own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(512)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=30))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        while not server.started:
            time.sleep(0.01)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=url, timeout=60, headers=headers) as http:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=token or "none", max_retries=0, timeout=60)
            yield SimpleNamespace(url=url, http=http, openai=client, app=app, server=server, thread=thread)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def checkpoint(own_base, processor, tmp_path_factory) -> Path:
    """A toy whose answers depend on the image, on k and on the question: most random models answer everything alike,
    and with such a one a mix-up of rows would not show."""
    for seed in range(100):
        torch.manual_seed(seed)
        base = LlavaForConditionalGeneration.from_pretrained(own_base)
        model = shake(add_fwd2bot(base, settings(), processor), seed=seed).eval()
        images = [pixels(i) for i in range(4)]
        asked = [
            answer(model, processor, [question] * 4, images, k=k, max_new_tokens=5)
            for question, k in ((QUESTION, 4), (QUESTION, 2), (f"{QUESTION} 1", 4))
        ]
        if len(set(asked[0])) > 2 and asked[0] != asked[1] and asked[0] != asked[2]:
            path = tmp_path_factory.mktemp("lively") / "checkpoint"
            model.save_pretrained(path, processor=processor)
            return path
    raise AssertionError("no toy answers different images differently")


@pytest.fixture(scope="module")
def loaded(checkpoint) -> tuple[Any, Any]:
    return load_fwd2bot(checkpoint)


@pytest.fixture(scope="module")
def cached(loaded, checkpoint, tmp_path_factory) -> Path:
    """A cache of four pictures, called pets.cache."""
    folder = tmp_path_factory.mktemp("serve")
    for i, name in enumerate(("a.png", "b.png", "beach/c.png", "beach/d.png")):
        (folder / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pets" / name).write_bytes(file_bytes(pixels(i)))
    size = loaded[0].get_input_embeddings().weight.shape[1]
    settings = CacheSettings(fingerprint_of(checkpoint), 4, size, "float16", "mean", **OWN.as_settings())
    cache = SummaryCache.create(folder / "pets.cache", settings)
    fill(cache, Source([str(folder / "pets")]), Compressor(*loaded, 4, 2, reading=OWN))
    return folder / "pets.cache"


def app_of(loaded: tuple[Any, Any], checkpoint: Path, *paths: Path, **options: Any) -> Any:
    caches = Caches([str(path) for path in paths], fingerprint_of(checkpoint))
    return create_app(*loaded, "toy", caches=caches, **options)


@pytest.fixture(scope="module")
def server(loaded, cached, checkpoint) -> Iterator[SimpleNamespace]:
    with listening(app_of(loaded, checkpoint, cached)) as running:
        yield running


def refused(response: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of a response, which must be OpenAI's."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code, error
    return error
