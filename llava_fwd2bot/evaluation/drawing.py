"""What the pictures of all reports share: matplotlib, imported late, and a figure as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
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


def panels(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure with `count` axes of `size` inches each, at most three beside each other."""
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = pyplot().subplots(lines, columns, figsize=(size[0] * columns, size[1] * lines), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def powers(axis: Any, ticks: Sequence[int]) -> None:
    """Numbers of tokens or questions along x, each twice the last, over a grid."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.grid(alpha=0.3)


def plain(axis: Any) -> None:
    """No frame above and to the right."""
    axis.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """The figure's PNG; the figure is closed."""
    out = io.BytesIO()
    figure.savefig(out, dpi=130, format="png")
    pyplot().close(figure)
    return out.getvalue()
