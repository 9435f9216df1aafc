"""What a user sees of errors, warnings and libraries: one line each, on stderr.

FWD2BOT_TRACEBACK=1   errors are raised, with their traceback
FWD2BOT_LOG=debug     what libraries warn of and log is shown as well
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
# loggers of libraries whose warnings are about their own working, not about the user's input
CHATTY = ("bitsandbytes", "kernels", "torchao")
CHATTY_IN_ANSWERS = ("accelerate", "transformers")  # what these say while training is worth reading


def tell(text: str) -> None:
    """Text on stderr; what a terminal would take for a command, as in a file's name, is escaped."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    try:
        print(f"fwd2bot: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # whoever read stderr is gone
        discard_output()


def message_of(error: BaseException) -> str:
    """An error in words. What is not a user's error names its type, and says how to see where it happened."""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's, of GPU and CPU
        return "the device is out of memory: try a smaller --batch-size, --load-4bit or another --device"
    if isinstance(error, MemoryError):
        return "the memory of this machine is not enough: try a smaller --batch-size"
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
        "again with FWD2BOT_TRACEBACK=1, which shows where it happened, and report what that prints)"
    )


def wants_traceback() -> bool:
    return os.environ.get("FWD2BOT_TRACEBACK") == "1"


def wants_debug() -> bool:
    return os.environ.get("FWD2BOT_LOG", "").lower() == "debug"


# ---------------------------------------------------------------------- a reader that has gone
def flush() -> None:
    """Writes out what is buffered: an error shows now, and not when the interpreter ends."""
    if sys.stdout is not None:  # closed from the start: `>&-`
        sys.stdout.flush()


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                return True
        except (OSError, ValueError, AttributeError):  # no file beneath it; no poll on this system
            continue
    return False


def discard_output() -> None:
    """Sends what is buffered and cannot be written nowhere, so that the interpreter has nothing to complain about."""
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
    """Within it our warnings are one line without a source line, and those of libraries go to the debug log.

    Characters that stdout cannot encode are escaped, not an error: a file's name may hold any bytes.

    Args:
        quiet: whether transformers' and accelerate's own loggers are turned down, too.
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
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets its level as it is imported
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
    """Turns off the bars of what transformers does in seconds; those of downloads stay."""
    if wants_debug():
        return
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
