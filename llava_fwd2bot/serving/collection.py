"""`/v1/search`, `/v1/images`, `/v1/thumbnails` and `/v1/look`: a collection of images and what was seen in one."""

from __future__ import annotations

import asyncio
import base64
import os
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ..cache.decode import Preparer
from ..cache.format import is_local
from ..cache.search import thumbnail
from ..files.images import ImageError
from .caches import Stored
from .errors import APIError, invalid
from .lifecycle import Deadline, result_of, within
from .pictures import SCHEME
from .schemas import ImageRequest, LookRequest, SearchRequest
from .service import Service


def routes(app: FastAPI, service: Service) -> None:

    @app.post("/v1/search", summary="Find images of a cache by words or by an image")
    async def search(body: SearchRequest, request: Request) -> dict[str, Any]:
        return await within(request, _search(service, body), Deadline(service.limits.seconds))

    replaced = {200: {"description": "The image is in the place of an earlier one of this id"}}

    @app.post("/v1/images", summary="Compress an image and store its summary", status_code=201, responses=replaced)
    async def add(body: ImageRequest, request: Request) -> JSONResponse:
        return await within(request, _add(service, body), Deadline(service.limits.seconds))

    @app.get("/v1/images/{image_id:path}", summary="What is known of an image")
    async def about(image_id: str, cache: str | None = None) -> dict[str, Any]:
        return (await asyncio.to_thread(service.caches.find, image_id, "id", cache)).about()

    @app.delete("/v1/images/{image_id:path}", summary="Take an image out of its cache")
    async def delete(image_id: str, cache: str | None = None) -> dict[str, Any]:
        gone = await asyncio.to_thread(service.caches.delete, image_id, cache)
        return {"id": gone.row["id"], "object": "image", "cache": gone.cache, "deleted": True}

    @app.get("/v1/thumbnails/{image_id:path}", summary="A small JPEG of an image whose file is there")
    async def small(image_id: str, cache: str | None = None) -> Response:
        image = await asyncio.to_thread(service.caches.find, image_id, "id", cache)
        source = image.row["source"]
        made = await asyncio.to_thread(thumbnail, source) if is_local(source) else None
        if made is None:
            raise APIError(404, f"The file of {image.row['id']} is not there: its summary is.", "no_file", "id")
        return Response(base64.b64decode(made), media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    @app.post("/v1/look", summary="What each summary token attended to")
    async def look(body: LookRequest, request: Request) -> dict[str, Any]:
        return await within(request, _look(service, body), Deadline(service.limits.seconds))


async def _search(service: Service, body: SearchRequest) -> dict[str, Any]:
    name, _ = service.caches.named(body.cache)
    given = [field for field in ("query", "image", "id") if getattr(body, field) is not None]
    if len(given) != 1:
        raise invalid("Give one of query, image and id.", given[0] if given else "query")
    if body.top > service.limits.hits:
        raise invalid(f"{body.top} hits were asked for; up to {service.limits.hits} are given.", "top")
    for text, param in ((body.filter, "filter"), (body.id, "id"), (body.image, "image")):
        _check_text(text, param)
    k = service.caches.k(name)
    if body.query is not None:
        query, _ = await service.text(body.query, "query")
    else:
        url = body.image if body.image is not None else f"{SCHEME}{body.id}"
        param = given[0]
        query = (await service.seen(url, param, cache=name if param == "id" else None)).summary
    if len(query) < k:
        raise invalid(f"The image has {len(query)} summary tokens, but {name} compares {k}.", given[0], "k_too_small")
    hits = await asyncio.to_thread(service.caches.search, name, query[:k], body.top, body.filter)
    data = await asyncio.to_thread(lambda: [_hit(name, image, score) for image, score in hits])
    return {"object": "list", "cache": name, "data": data}


def _hit(cache: str, image: Stored, score: float) -> dict[str, Any]:
    """`file`: whether there is a thumbnail."""
    source = image.row["source"]
    there = is_local(source) and os.path.isfile(source)
    return {**image.about(), "score": score, "url": f"{SCHEME}{cache}/{image.row['id']}", "file": there}


async def _add(service: Service, body: ImageRequest) -> JSONResponse:
    _check_id(body.id)
    name, cache = service.caches.writable(body.cache)
    data = await asyncio.to_thread(service.fetcher, body.image, "image")
    key, size = await asyncio.to_thread(service.caches.known, name, data)
    exif: dict[str, Any] = {}
    summary = None
    if size is None:
        settings = cache.settings
        model = service.model
        prepare = Preparer(
            model.processor, model.model, model.limits.pixels, settings.reading, settings.decoding == "fast"
        )
        try:
            prepared = await asyncio.to_thread(prepare, data, "the image")
        except ImageError as error:
            raise invalid(str(error), "image", "invalid_image") from error
        size, exif = prepared.size, prepared.exif
        summary = (await result_of(model.submit("compress", prepared.pixels))).summary
    # once it is being stored it is stored to its end, also where the client goes
    storing = asyncio.to_thread(service.caches.add, name, body.id, data, key, size, exif, summary, service.pooling)
    stored, new = await asyncio.shield(storing)
    content = {**stored.about(), "url": f"{SCHEME}{name}/{body.id}", "compressed": summary is not None}
    return JSONResponse(content, 201 if new else 200)


async def _look(service: Service, body: LookRequest) -> dict[str, Any]:
    service.check_k(body.k)
    data = await asyncio.to_thread(service.fetcher, body.image, "image")
    image = await service.picture(data, "image")
    try:
        pixels = await asyncio.to_thread(service.model.pixels, image)
    except ImageError as error:
        raise invalid(str(error), "image", "invalid_image") from error
    try:
        maps = (await result_of(service.model.submit("look", pixels)))[: body.k]  # [k, G, G]
    except ValueError as error:  # the host's dense tokens are no grid
        raise invalid(str(error), "image", "no_map") from error
    rounded = [[[round(value, 6) for value in row] for row in one] for one in maps.tolist()]
    return {"object": "attention", "k": len(maps), "grid": list(maps.shape[1:]), "maps": rounded}


def _check_id(name: str) -> None:
    """APIError for an id that could not be asked for by a path."""
    _check_text(name, "id")
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        raise invalid("An id is printable, and a path below nothing: no '//', '.', '..', nor '/' at its ends.", "id")


def _check_text(text: str | None, param: str) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise invalid("The text holds half of a surrogate pair, which is no character.", param) from error
    if "\0" in (text or ""):
        raise invalid("The text holds a NUL character.", param)
