"""What the pictures of all reports share: matplotlib, imported late, and a figure as a PNG."""

from __future__ import annotations

import io
from typing import Any


def pyplot() -> Any:
    """matplotlib's pyplot, without a display.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'llava_fwd2bot[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(figure: Any) -> bytes:
    """The figure's PNG; the figure is closed."""
    out = io.BytesIO()
    figure.savefig(out, dpi=130, format="png")
    pyplot().close(figure)
    return out.getvalue()
