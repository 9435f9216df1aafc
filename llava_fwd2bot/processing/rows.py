"""The images, or the summaries, of each question of `answer`.

Shapes: M images, k summary tokens, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..files.images import open_image
from ..files.pixels import OWN


def image_rows(questions: Sequence[str], images: Any, single: bool) -> tuple[list[int], list[list[Any]]]:
    """How many images belong to each question, and the images."""
    several = isinstance(images, (list, tuple))
    if single:
        rows = [_listed(images)]
    elif not several:
        rows = [[images]] * len(questions)
    else:
        rows = [_listed(row) for row in images]
        if len(rows) != len(questions):
            raise ValueError(
                f"There are {len(questions)} questions and {len(rows)} images: give one image, or one list of images, "
                "for each question, or a single image for all of them."
            )
    opened: dict[Any, Image.Image] = {}
    for image in (image for row in rows for image in row):
        key = id(image) if isinstance(image, Image.Image) else image
        if key not in opened:
            opened[key] = _opened(image)
    rows = [[opened[id(i) if isinstance(i, Image.Image) else i] for i in row] for row in rows]
    return [len(row) for row in rows], rows


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]


def _opened(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, os.PathLike)):
        return open_image(image, reading=OWN)  # as `ask` and `compress` read people's own photographs
    raise ValueError(f"An image is the path of a file or a PIL image, got {type(image).__name__}.")


def summary_rows(
    model: Any, questions: Sequence[str], summary: Any, single: bool, k: int | None
) -> tuple[list[int], list[Tensor]]:
    """How many images belong to each question, and their summaries [M, k, D]."""
    if isinstance(summary, Tensor):
        if summary.dim() == 2:
            rows = [summary[None]] * len(questions)
        elif single or summary.dim() != 3:
            rows = [summary]
        else:
            rows = [one[None] for one in summary]
    elif single:
        rows = [torch.stack(list(summary))]
    else:
        rows = [one[None] if one.dim() == 2 else one for one in summary]
    if len(rows) != len(questions):
        raise ValueError(
            f"There are {len(questions)} questions and {len(rows)} summaries: give one summary for each question, as "
            f"[{len(questions)}, k, D] or a list, or a single one, as [k, D], for all of them."
        )
    size = model.get_input_embeddings().weight.shape[1]
    for row in rows:
        if row.dim() != 3 or row.shape[-1] != size:
            raise ValueError(f"A summary is [k, {size}], or [images, k, {size}], not {list(row.shape)}.")
        if k is not None and k > row.shape[1]:
            raise ValueError(f"The summaries hold {row.shape[1]} tokens per image, but k = {k}.")
    return [len(row) for row in rows], [row[:, :k] for row in rows]
