"""`create_app`: the server as an ASGI application.

model, processor = load_fwd2bot("my-fwd2bot")
app = create_app(model, processor, "my-fwd2bot", caches=Caches(["photos.cache"], fingerprint))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from torch import nn

from ..version import __version__
from . import chat, collection, embedding
from .caches import Caches
from .engine import AnswerEngine
from .errors import APIError, install
from .guards import LOCAL, Guard
from .limits import Limits
from .metrics import Counted
from .pictures import Fetcher
from .schemas import ErrorBody
from .service import Service

PAGE = Path(__file__).with_name("page")
SCRIPT = "text/javascript"
FILES = {"index.html": "text/html", "style.css": "text/css", "script.js": SCRIPT, "look.js": SCRIPT}
# the page brings all that it needs: nothing of others is loaded, nothing but this server is asked, no frame holds it
POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def create_app(
    model: nn.Module,
    processor: Any,
    name: str,
    *,
    caches: Caches | None = None,
    limits: Limits | None = None,
    engine: AnswerEngine | None = None,
    token: str | None = None,
    hosts: Sequence[str] = LOCAL,
    fetch_hosts: Sequence[str] = (),
) -> FastAPI:
    """The application; its `state.service` is the Service, which is closed when the application ends.

    Args:
        model, processor: of `load_fwd2bot`.
        name: of the model, in requests.
        engine: that answers in the place of the model, from the model's summaries.
        token: that requests must bring; None: none is needed, and requests must name one of `hosts`.
        fetch_hosts: from which URLs of images are fetched; with none, no URL is.
    """
    limits = limits or Limits()
    caches = Caches([], "") if caches is None else caches
    service = Service(model, processor, name, limits, caches, Fetcher(limits, fetch_hosts), engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    errors = {"4XX": {"model": ErrorBody, "description": "The request was refused"}}
    errors |= {"5XX": {"model": ErrorBody, "description": "The server failed"}}
    app = FastAPI(
        title="Fwd2Bot", version=__version__, lifespan=lifespan, responses=errors, docs_url=None, redoc_url=None
    )
    app.state.service = service
    install(app)
    for routes in (chat.routes, embedding.routes, collection.routes, _routes):
        routes(app, service)
    app.add_middleware(Guard, token=token, hosts=tuple(hosts), most=limits.body_bytes)
    app.add_middleware(Counted, metrics=service.metrics)
    return app


def _routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="The models, and what they are")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @app.get("/health", summary="Whether the server can answer")
    async def health() -> dict[str, Any]:
        if not service.model.batcher.alive:
            raise APIError(503, "The model's thread has ended: restart the server.", "model_gone")
        counts = await asyncio.to_thread(service.caches.counts)
        return {"status": "ok", "model": service.name, "images": counts, "waiting": service.model.batcher.waiting()}

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return _file(name)


def _file(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise APIError(404, f"The page has no file {name[:100]!r}.")
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response((PAGE / name).read_bytes(), media_type=FILES[name], headers=headers)


def _model(service: Service, name: str) -> dict[str, Any]:
    own = {"id": name, "object": "model", "created": service.created, "owned_by": "llava_fwd2bot"}
    if name != service.name:
        return {**own, "fwd2bot": None}
    size = service.model.like.shape[1]
    trained = sorted(service.config.nested_k or [service.k])
    limits = service.limits
    facts = {"k": service.k, "trained_k": trained, "hidden_size": size, "caches": service.caches.names}
    return {**own, "fwd2bot": {**facts, "max_images": limits.images, "max_tokens": limits.new_tokens}}
