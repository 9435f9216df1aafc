"""What stands before every request: the bearer token, the host's name, and the size of the body.

Plain ASGI, so that a request's messages, of which the last says that the client has gone, come through unchanged.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from .errors import APIError, api_error

LOCAL = ("localhost", "127.0.0.1", "::1")
PATIENCE = 60.0  # seconds that a client may take to send the next piece of a body
OPEN = ("/", "/health")  # and /page/: the page has no data of its own; it asks for the token


def is_local_host(host: str) -> bool:
    """Whether a server that listens on `host` is reached from this machine alone."""
    return host in LOCAL or host.startswith("127.")


class Guard:
    """ASGI middleware.

    Args:
        token: that requests must bring as `Authorization: Bearer TOKEN`; None where none is needed.
        hosts: names that the `Host` header may have where there is no token. A page on the web can have its name
            resolve to 127.0.0.1, and would then speak to this server as if it were its own.
        most: bytes of a body.
    """

    def __init__(self, app: Any, token: str | None, hosts: tuple[str, ...], most: int) -> None:
        self.app, self.token, self.hosts, self.most = app, token, hosts, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope["path"], headers)
            body = await self._body(receive)
            if body is None:  # the client has gone
                return
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, _Replayed(body, receive), watched)
        except Exception as error:  # further out it would be answered as well, but its connection closed
            if started:
                raise
            await api_error(error).response()(scope, receive, send)

    async def _body(self, receive: Any) -> bytes | None:
        """The whole body, which may have more bytes than its header says."""
        parts, seen, more = [], 0, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except asyncio.TimeoutError:
                raise APIError(408, f"Nothing of the body came for {PATIENCE:g} seconds.", "timeout") from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            seen, more = seen + len(parts[-1]), message.get("more_body", False)
            if seen > self.most:
                raise _too_large(self.most)
        return b"".join(parts)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if self.token is None:
            if self.hosts and _name(headers.get("host", "")) not in self.hosts:
                raise APIError(403, "The Host header names another host than this server.", "wrong_host")
        elif path not in OPEN and not path.startswith("/page/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                needed = "A bearer token is needed, as `Authorization: Bearer TOKEN`."
                wrong = "The bearer token is wrong."
                headers = {"WWW-Authenticate": "Bearer"}
                raise APIError(401, wrong if given else needed, "invalid_api_key", headers=headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most:
            raise _too_large(self.most)


class _Replayed:
    """Gives the body that was read, then what else comes."""

    def __init__(self, body: bytes, receive: Any) -> None:
        self.body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Any:
        if self.body is None:
            return await self._receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _too_large(most: int) -> APIError:
    return APIError(413, f"The request has more than {most:,} bytes, which is the limit.", "request_too_large")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()
