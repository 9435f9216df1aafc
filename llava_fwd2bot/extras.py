"""Packages that come with an extra: imported where they are needed, with an error that names the extra."""

from __future__ import annotations

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


def install_command(extra: str) -> str:
    """The commands that install an extra."""
    return f"pip install 'llava_fwd2bot[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
