"""`/v1/embeddings`: unit vectors of texts and images in one space; their dot product is what search compares."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from torch import Tensor

from .caches import pooled
from .errors import invalid
from .lifecycle import Deadline, within
from .schemas import EmbeddingRequest, ImagePart, TextPart
from .service import Service


def routes(app: FastAPI, service: Service) -> None:

    @app.post("/v1/embeddings", summary="Vectors of texts and images")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        return await within(request, _embeddings(service, body), Deadline(service.limits.seconds))


async def _embeddings(service: Service, body: EmbeddingRequest) -> dict[str, Any]:
    if service.check_model(body.model):
        raise invalid("The base has no embeddings.", "model")
    size = service.model.like.shape[1]
    if body.dimensions not in (None, size):
        raise invalid(f"The vectors have {size} dimensions; others are not made.", "dimensions")
    items = _items(body)
    if len(items) > service.limits.texts:
        raise invalid(f"{len(items)} inputs were given; up to {service.limits.texts} are taken.", "input")
    service.check_count(sum(isinstance(item, ImagePart) for item, _ in items))
    tasks = [asyncio.ensure_future(_summary(service, item, place)) for item, place in items]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    data = [
        {"object": "embedding", "index": i, "embedding": _written(pooled(summary, service.pooling), body)}
        for i, (summary, _) in enumerate(found)
    ]
    tokens = sum(count for _, count in found)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model or service.name, "usage": usage}


def _items(body: EmbeddingRequest) -> list[tuple[str | TextPart | ImagePart, str]]:
    """Texts and parts with their places in the request."""
    if (body.input is None) == (body.messages is None):
        raise invalid("Give either input or messages.", "input")
    if body.messages is not None:
        if len(body.messages) != 1:
            raise invalid("One message is taken, whose parts are embedded each by itself.", "messages")
        content, place = body.messages[0].content, "messages.0.content"
    else:
        content, place = body.input, "input"
    if isinstance(content, str):
        return [(content, place)]
    if not content:
        raise invalid("There is nothing to embed.", place, "empty_input")
    return [(item, f"{place}.{i}") for i, item in enumerate(content)]


async def _summary(service: Service, item: str | TextPart | ImagePart, place: str) -> tuple[Tensor, int]:
    """[k, D] and the tokens that were read."""
    if isinstance(item, ImagePart):
        seen = await service.seen(item.image_url.url, f"{place}.image_url.url")
        return seen.summary, seen.dense or 0
    return await service.text(item if isinstance(item, str) else item.text, place)


def _written(vector: Tensor, body: EmbeddingRequest) -> list[float] | str:
    values = vector.float().numpy().astype("<f4")
    if body.encoding_format == "base64":
        return base64.b64encode(values.tobytes()).decode()
    return np.asarray(values).tolist()
