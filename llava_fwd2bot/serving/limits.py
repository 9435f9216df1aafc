"""What the server takes from one request, and from all of them at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the server; a request over one of them is refused with a 4xx error that names it.

    Args:
        body_bytes: of a request.
        image_bytes: of one image's file.
        pixels: of one image, read from its header before it is decoded.
        images: in one request.
        prompt_tokens: of a question with its conversation and its summary tokens.
        new_tokens: of an answer.
        texts: in one request for embeddings.
        hits: of one search.
        queue: requests that wait for the model; more are refused with 429.
        seconds: that a request may take, from its arrival to its last byte.
        batch: requests that the model works on at once.
    """

    body_bytes: int = 32 * 2**20
    image_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    images: int = 8
    prompt_tokens: int = 4096
    new_tokens: int = 1024
    texts: int = 64
    hits: int = 100
    queue: int = 256
    seconds: float = 300.0
    batch: int = 16
