"""What the pictures of all reports share: matplotlib, imported late, and a figure as a PNG."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

from ..extras import require


def pyplot() -> Any:
    """matplotlib's pyplot, without a display.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    require("matplotlib", "eval", "The picture").use("Agg")
    return import_module("matplotlib.pyplot")


def png(figure: Any) -> bytes:
    """The figure's PNG; the figure is closed."""
    out = io.BytesIO()
    figure.savefig(out, dpi=130, format="png")
    pyplot().close(figure)
    return out.getvalue()
