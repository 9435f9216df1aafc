"""Errors, warnings and library output on stderr, one line each.

FWD2BOT_TRACEBACK=1   errors are raised, with their traceback
FWD2BOT_LOG=debug     warnings and logs of libraries are shown as well
"""

from __future__ import annotations

import logging
import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..version import __version__

PACKAGE = str(Path(__file__).resolve().parents[1])
LONGEST = 400  # characters of an unexpected error's message
# loggers of libraries whose warnings do not concern the user's input
CHATTY = ("bitsandbytes", "kernels", "torchao")
CHATTY_IN_ANSWERS = ("accelerate", "transformers")  # their warnings matter while training


def tell(text: str) -> None:
    """Text on stderr; what a terminal would take for a command, as in a file's name, is escaped."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    try:
        print(f"fwd2bot: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # the reader of stderr has exited
        discard_output()


def message_of(error: BaseException) -> str:
    """The message of an error. An unexpected error names its type and how to get the traceback."""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's, of GPU and CPU
        return "the device is out of memory: try a smaller --batch-size, --load-4bit or another --device"
    if isinstance(error, MemoryError):
        return "this machine is out of memory: try a smaller --batch-size"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (ValueError, OSError, ImportError)) and str(error).strip():
        return str(error)
    words = " ".join(str(error).split())
    words = words[:LONGEST] + " …" * (len(words) > LONGEST)
    return (
        f"{type(error).__name__}{': ' * bool(words)}{words} (this is a fault of fwd2bot {__version__}: run the command "
        "again with FWD2BOT_TRACEBACK=1 and report the traceback)"
    )


def wants_traceback() -> bool:
    return os.environ.get("FWD2BOT_TRACEBACK") == "1"


def wants_debug() -> bool:
    return os.environ.get("FWD2BOT_LOG", "").lower() == "debug"


# ---------------------------------------------------------------------- closed pipes
def flush() -> None:
    """Flushes stdout, so that an error is raised now and not when the interpreter exits."""
    if sys.stdout is not None:  # closed by the caller: `>&-`
        sys.stdout.flush()


def reader_has_exited() -> bool:
    """Whether stdout or stderr is a pipe whose reader has exited."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                return True
        except (OSError, ValueError, AttributeError):  # not a file; or no poll on this system
            continue
    return False


def discard_output() -> None:
    """Redirects unwritable output to /dev/null, so that the interpreter exits without an error message."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


# ---------------------------------------------------------------------- warnings and libraries
@contextmanager
def plain_output(quiet: bool = True) -> Iterator[None]:
    """Context in which our warnings are one line without a source line, and libraries' go to the debug log.

    Characters that stdout cannot encode are escaped, because file names may hold any bytes.

    Args:
        quiet: also silence the loggers of transformers and accelerate.
    """
    seen: set[str] = set()
    before = warnings.showwarning

    def show(message: Any, category: type, filename: str, lineno: int, *rest: Any) -> None:
        text = " ".join(str(message).split())
        if str(filename).startswith(PACKAGE) and issubclass(category, (UserWarning, RuntimeWarning)):
            if text not in seen:
                tell(f"warning: {text}")
            seen.add(text)
        elif wants_debug():
            tell(f"debug: {filename}:{lineno}: {category.__name__}: {text}")

    streams = [(s, s.errors) for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    for stream, _ in streams:
        stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = show
    loggers = [logging.getLogger(name) for name in (*CHATTY, *(CHATTY_IN_ANSWERS if quiet else ()))]
    levels = [(logger, logger.level) for logger in loggers]
    if not wants_debug():
        if quiet:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
        for logger in loggers:
            logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.showwarning = before
        for logger, level in levels:
            logger.setLevel(level)
        for stream, errors in streams:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def quiet_bars() -> None:
    """Turns off transformers' progress bars, except those of downloads."""
    if wants_debug():
        return
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
