"""The server's socket and its end: a port that is taken is told before the model is loaded; a stop finishes answers."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

from .guards import LOCAL, is_local_host
from .limits import Limits

TOKEN = "FWD2BOT_TOKEN"  # the variable of the environment


def token_of(host: str, file: str | None) -> str | None:
    """The bearer token, of a file or of the environment.

    Raises:
        ValueError: there is none, and `host` is reached from other machines; or it is empty or too short to be one.
    """
    token = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN, "").strip() or None
    if token is None:
        if not is_local_host(host):
            raise ValueError(
                f"{host} is reached from other machines, so a bearer token is needed: give --token-file FILE, or set "
                f"{TOKEN}; or listen on 127.0.0.1."
            )
        return None
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("The token must have at least 8 characters, all of them ASCII, and no spaces.")
    return token


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on the port.

    Raises:
        OSError: the port is in use, or the address is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: what cannot be a name at all
        reason = getattr(error, "strerror", None) or "no name"
        raise OSError(errno.EADDRNOTAVAIL, f"There is no address {host[:100]} ({reason})") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed leaves connections
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        words = {
            errno.EADDRINUSE: f"Port {port} of {host} is in use: stop what listens there, or choose another --port",
            errno.EACCES: f"Port {port} may not be used by this user: choose a --port above 1023",
        }
        raise OSError(error.errno, words.get(error.errno, f"{host} port {port}: {error.strerror}")) from error
    return listening


def hosts_of(host: str) -> tuple[str, ...]:
    """The names that the Host header may have where no token is needed."""
    return (*LOCAL, host)


def run(app: Any, listening: socket.socket, limits: Limits) -> None:
    """Serves until SIGINT or SIGTERM; then no new request is taken, and answers in hand are finished. A second signal
    ends it at once."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
        h11_max_incomplete_event_size=64 * 1024,
    )
    uvicorn.Server(config).run(sockets=[listening])
