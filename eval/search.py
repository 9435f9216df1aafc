"""Exact search: where the right image stands for each caption, and the right caption for each image.

Shapes: N images, C captions, k tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

Scores = Callable[[Tensor, Tensor], Tensor]  # (images […N], captions […C]) → [N, C]
TIE = 1e-6
BLOCK = 64 * 2**20  # scores in memory at once


def cosine(images: Tensor, captions: Tensor) -> Tensor:
    """Unit vectors [N, D], [C, D] → [N, C]"""
    return images @ captions.T


def unit_tokens(summary: Tensor) -> Tensor:
    return F.normalize(summary.float(), dim=-1)


def ranks(
    images: Tensor, captions: Tensor, owner: Tensor, scores: Scores = cosine, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """How many stand before the right one: of images for each caption [C], of captions for each image [N].

    Of those within TIE of the right one, which rounding cannot tell from it, half stand before it: where all
    embeddings are alike, nothing is found. For an image the best of its own captions is the right one.

    Args:
        owner: the image of each caption, [C]; every image has one at least.
    """
    count = len(images)
    cost = 1 if images.dim() == 2 else images.shape[1] * captions.shape[1]
    step = max(1, block // (count * cost))
    parts = [slice(at, at + 4096) for at in range(0, len(owner), 4096)]
    own = torch.cat([_own(images[owner[part]], captions[part], scores) for part in parts])  # [C]
    best = torch.full((count,), float("-inf")).scatter_reduce(0, owner, own, "amax")  # [N]
    t2i, above, level = torch.empty(len(owner), dtype=torch.long), *torch.zeros(2, count, dtype=torch.long)
    for at in tqdm(range(0, len(owner), step), desc="search", unit="block", disable=len(owner) <= step):
        mine = owner[at : at + step]
        found = scores(images, captions[at : at + step])  # [N, c]
        columns = torch.arange(len(mine))
        # a pair can differ in the last bit from block to block: the right one is not compared with itself
        found[mine, columns] = float("-inf")
        higher, near = _beside(found, own[at : at + step], 0)
        t2i[at : at + step] = higher + near // 2
        higher, near = _beside(found, best[:, None], 1)
        above, level = above + higher, level + near
    return t2i, above + level // 2


def _beside(found: Tensor, right: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """How many scores are higher than the right one, and how many as high."""
    higher = (found > right + TIE).sum(dim)
    return higher, (found >= right - TIE).sum(dim) - higher


def _own(images: Tensor, captions: Tensor, scores: Scores) -> Tensor:
    if images.dim() == 2:
        return (images * captions).sum(1)
    return torch.cat([scores(images[i : i + 1], captions[i : i + 1])[0] for i in range(len(images))])


def recalls(t2i: Tensor, i2t: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """R@n both ways, [0, 1], and the median rank, from 1."""
    found: dict[str, Any] = {}
    for name, before in (("t2i", t2i), ("i2t", i2t)):
        found.update({f"{name}_r{n}": (before < n).double().mean().item() for n in at})
        found[f"{name}_median_rank"] = before.double().quantile(0.5).item() + 1
    return found
