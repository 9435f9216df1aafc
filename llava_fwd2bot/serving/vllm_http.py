"""HTTP to an OpenAI-compatible engine by the standard library: JSON there and back, and answers as they come."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

PLAIN_PORT = {"http": 80, "https": 443}


class EngineError(RuntimeError):
    """An engine is not there, refused, or stopped in the middle; `status` is HTTP's, where it answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    """One engine. Every request has a connection of its own, so that threads may share it.

    Args:
        url: such as http://localhost:8000, with or without /v1.
        api_key: what the engine was started with by --api-key.
        timeout: seconds without a byte after which a request is given up.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 120.0) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in PLAIN_PORT or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not the address of an engine: say http://localhost:8000, for example.")
        self.secure, self.host = parts.scheme == "https", parts.hostname
        self.port = port or PLAIN_PORT[parts.scheme]
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.path}"
        self.timeout = timeout
        self.headers = {"Accept": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> dict[str, Any]:
        """The JSON at `path`. Raises EngineError."""
        return self._json("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON that answers `body`. Raises EngineError."""
        return self._json("POST", path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events that answer `body`, as they come.

        Raises:
            EngineError: it refused, told of an error, or ended without saying that it was done.
        """
        connection = self._connect()
        try:
            response = self._ask(connection, "POST", path, {**body, "stream": True})
            if response.status != 200:
                raise self._refusal(response, path)
            while line := self._line(response):
                if not line.startswith(b"data:"):  # comments that keep the connection open, and empty lines
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = self._parsed(data, path)
                if "error" in event:
                    raise EngineError(f"The engine at {self.url} stopped in the middle: {_detail(event)}")
                yield event
            raise EngineError(f"The engine at {self.url} ended in the middle of an answer: is it still running?")
        finally:
            connection.close()

    # ------------------------------------------------------------------ requests
    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=self.timeout)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        content = None if body is None else json.dumps(body).encode()
        headers = self.headers if body is None else {**self.headers, "Content-Type": "application/json"}
        try:
            connection.connect()
        except OSError as error:
            raise EngineError(f"There is no engine at {self.url} ({error}): is it started, and ready?") from error
        try:
            connection.request(method, f"{self.path}{path}", content, headers)
            return connection.getresponse()
        except TimeoutError as error:
            raise self._late() from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"The engine at {self.url} closed the connection ({error or type(error).__name__})."
            ) from error

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        connection = self._connect()
        try:
            response = self._ask(connection, method, path, body)
            if response.status != 200:
                raise self._refusal(response, path)
            return self._parsed(self._read(response), path)
        finally:
            connection.close()

    # ------------------------------------------------------------------ answers
    def _line(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline()
        except TimeoutError as error:
            raise self._late() from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"The engine at {self.url} ended in the middle of an answer ({error}).") from error

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read()
        except TimeoutError as error:
            raise self._late() from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"The engine at {self.url} ended in the middle of an answer ({error}).") from error

    def _late(self) -> EngineError:
        return EngineError(f"The engine at {self.url} gave no sign for {self.timeout:g} seconds.")

    def _parsed(self, content: bytes, path: str) -> dict[str, Any]:
        try:
            values = json.loads(content)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise EngineError(f"{self.url}{path} did not answer with JSON: is an engine there, or something else?")
        return values

    def _refusal(self, response: http.client.HTTPResponse, path: str) -> EngineError:
        content = self._read(response)
        try:
            detail = _detail(json.loads(content))
        except (ValueError, AttributeError):
            detail = content[:200].decode(errors="replace") or response.reason
        if response.status == 401:
            detail += " (give the engine's key)"
        message = f"The engine at {self.url} answered {path} with {response.status}: {detail}"
        return EngineError(message, response.status)


def _detail(values: dict[str, Any]) -> str:
    """The message in an error of OpenAI's format, or of another."""
    error = values.get("error", values.get("detail", values))
    return str(error.get("message", error) if isinstance(error, dict) else error)
