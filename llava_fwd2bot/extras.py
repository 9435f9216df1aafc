"""Packages that come with an extra: imported where they are needed, with an error that names the extra."""

from __future__ import annotations

import logging
from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports `module`.

    Args:
        extra: the extra of this package that installs it, e.g. "cache".
        purpose: what needs it, as the subject of the error's sentence.

    Raises:
        ImportError: it is not installed, or cannot be imported; the message says how to install it.
    """
    name = module.split(".")[0]
    try:
        import_module(name)
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        raise ImportError(f"{purpose} needs {name}, which {problem}: {install_command(extra)}") from error


def kernel_hint_to_debug() -> None:
    """Moves a warning of bitsandbytes to the debug level: an optional kernel for 4-bit products on CPUs is missing.

    bitsandbytes gives it when it is imported, which PEFT does wherever it is installed, also for models that are not
    quantised.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def to_debug(record: logging.LogRecord) -> bool:
        if "gemm_4bit_forward" not in str(record.msg):
            return True
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logger.isEnabledFor(logging.DEBUG)

    logger.addFilter(to_debug)


def install_command(extra: str) -> str:
    """The commands that install an extra."""
    return f"pip install 'llava_fwd2bot[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
