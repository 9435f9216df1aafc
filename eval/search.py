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
BLOCK = 4 * 2**20  # scores of one tile: few enough to stay in a processor's cache while they are counted


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
        owner: the image of each caption, [C]; every image has one at least, or its own rank says nothing.

    Raises:
        ValueError: an embedding is not finite, which would compare as if nothing stood before it.
    """
    count = len(images)
    cost = 1 if images.dim() == 2 else images.shape[1] * captions.shape[1]
    side = max(1, int((block // cost) ** 0.5))
    parts = [slice(at, at + 4096) for at in range(0, len(owner), 4096)]
    own = torch.cat([_own(images[owner[part]], captions[part], scores) for part in parts])  # [C]
    if not own.isfinite().all():
        raise ValueError("Some embeddings are not finite: the model, or what was kept of it, is damaged.")
    best = torch.full((count,), float("-inf")).scatter_reduce(0, owner, own, "amax")  # [N]
    t2i, i2t = _Before(own), _Before(best)
    steps = range(0, len(owner), side)
    for at in tqdm(steps, desc="search", unit="block", disable=len(owner) * count * cost <= 64 * block):
        mine = owner[at : at + side]
        for row in range(0, count, side):
            found = scores(images[row : row + side], captions[at : at + side])  # [n, c]
            # a pair can differ in the last bit from tile to tile: the right one is not compared with itself
            here = ((mine >= row) & (mine < row + side)).nonzero()[:, 0]
            found[mine[here] - row, here] = float("-inf")
            t2i.add(found.T, at)
            i2t.add(found, row)
    return t2i.ranks(), i2t.ranks()


class _Before:
    """How many scores are above each right one, and how many as high; of scores that come tile by tile."""

    def __init__(self, right: Tensor) -> None:
        self.limits = torch.stack([right + TIE, right - TIE])[..., None]  # [2, R, 1]
        self.above = torch.zeros(2, len(right), dtype=torch.long)

    def add(self, found: Tensor, at: int) -> None:
        """Scores [r, c] of right ones `at` and on."""
        ones, rows = torch.ones(found.shape[1]), slice(at, at + found.shape[0])
        for limit, above in zip(self.limits, self.above, strict=True):
            # as numbers, and by a product: sums of booleans take ten times as long; exact up to 2^24
            above[rows] += (torch.gt(found, limit[rows], out=torch.empty_like(found)) @ ones).long()

    def ranks(self) -> Tensor:
        return self.above[0] + (self.above[1] - self.above[0]) // 2


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
