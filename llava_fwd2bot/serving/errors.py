"""Errors of the server, as status codes and bodies in OpenAI's format.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ..cache.format import DamagedCache

log = logging.getLogger("fwd2bot.serve")
LONGEST = 1000  # characters of a message: what a client has sent may stand in it
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
_TYPES |= {429: "rate_limit_error", 504: "timeout_error"}


class APIError(Exception):
    """What a client is told.

    Args:
        status: the HTTP status code.
        param: the field of the request that is wrong.
        code: for programs, such as "context_length_exceeded".
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        text = self.message if len(self.message) <= LONGEST else self.message[:LONGEST] + " …"
        text = text.encode("utf-8", "replace").decode()  # a client may send half of a surrogate pair
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, code or "invalid_value", param)


def busy(message: str) -> APIError:
    return APIError(429, message, "server_busy", headers={"Retry-After": "1"})


def api_error(error: BaseException) -> APIError:
    """The error that a client is told of for whatever was raised; what is a fault of the server is logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, DamagedCache):
        log.error("%s", error)
        return APIError(500, "The cache is damaged: `fwd2bot cache verify` says more.", "cache_damaged")
    if type(error).__name__ == "OutOfMemoryError":
        log.error("%s", error)
        return APIError(503, "The device is out of memory: start the server with a smaller --batch-size.", "no_memory")
    if isinstance(error, OSError):
        log.error("%s", error)
        return APIError(503, f"Storage failed: {error.strerror or type(error).__name__}.", "storage_failed")
    log.error("a request failed", exc_info=error)
    return APIError(500, f"The server failed ({type(error).__name__}); its log says more.", "internal_error")


def install(app: FastAPI) -> None:
    """Has every error of `app` answered in OpenAI's format."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{place}: {first['msg']}" if place else first["msg"]
        return invalid(message, place, "invalid_request").response()

    async def of_routing(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        words = {404: f"There is nothing at {path}.", 405: f"{request.method} is not allowed at {path}."}
        headers = {"Allow": ", ".join(_methods(request))} if error.status_code == 405 else error.headers
        return APIError(error.status_code, words.get(error.status_code, str(error.detail)), headers=headers).response()

    app.add_exception_handler(APIError, ours)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_routing)


def _methods(request: Request) -> list[str]:
    """The methods of all routes of a path: Starlette names those of the first alone."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)
