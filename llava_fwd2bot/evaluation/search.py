"""Exact search: the rank of the right image for each caption, and of the right caption for each image.

Shapes: N images, C captions, k tokens, D hidden size.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

Scores = Callable[[Tensor, Tensor], Tensor]  # (images […N], captions […C]) → [N, C]
TIE = 1e-6
PAIRS = 2**14  # pairs whose exact scores are computed at once
BLOCK = 4 * 2**20  # scores of one tile, which stay in the processor's cache while they are counted


def cosine(images: Tensor, captions: Tensor) -> Tensor:
    """Unit vectors [N, D], [C, D] → [N, C]"""
    return images @ captions.T


def unit_tokens(summary: Tensor) -> Tensor:
    return F.normalize(summary.float(), dim=-1)


def ranks(
    images: Tensor,
    captions: Tensor,
    owner: Tensor,
    scores: Scores = cosine,
    block: int = BLOCK,
    screen: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Ranks from 0: of the right image among images for each caption [C], of the right caption for each image [N].

    Scores within TIE of the right one count half, so that equal embeddings find nothing. The right caption of an image
    is the best of its own.

    Args:
        owner: the image of each caption, [C]; every image needs at least one caption.
        screen: compare in bfloat16 first and recompute only the pairs that its rounding leaves open, as long as they
            are few. Ranks are the same except where float32's rounding decides at TIE. Default: in a large search of
            vectors, if bfloat16 products are measured to be faster here.

    Raises:
        ValueError: an embedding is not finite, which would rank first.
    """
    count = len(images)
    cost = 1 if images.dim() == 2 else images.shape[1] * captions.shape[1]
    side = max(1, int((block // cost) ** 0.5))
    parts = [slice(at, at + 4096) for at in range(0, len(owner), 4096)]
    own = torch.cat([_own(images[owner[part]], captions[part], scores) for part in parts])  # [C]
    if not own.isfinite().all():
        raise ValueError("Some embeddings are not finite: the checkpoint or a file in --work is damaged.")
    best = torch.full((count,), float("-inf")).scatter_reduce(0, owner, own, "amax")  # [N]
    t2i, i2t = _Before(own), _Before(best)
    large = len(owner) * count * cost > 64 * block
    if screen is None:
        screen = large and images.dim() == 2 and _bfloat16_pays(images[:512], captions[:512], scores)
    rough = _Rough(images) if screen else None
    steps = range(0, len(owner), side)
    for at in tqdm(steps, desc="search", unit="block", disable=not large):
        part, mine = captions[at : at + side], owner[at : at + side]
        rough_part = _Rough(part) if rough is not None else None
        for row in range(0, count, side):
            rows = slice(row, row + side)
            # a score can differ in its last bit between tiles: the right one is not compared with itself
            here = ((mine >= row) & (mine < row + side)).nonzero()[:, 0]
            if rough is not None:
                found, error = scores(rough.values[rows], rough_part.values), rough.error(rough_part)  # [n, c]
                found[mine[here] - row, here] = float("-inf")
                looks = t2i.look(found.T, at, error), i2t.look(found, row, error)
                # a single pair costs about a hundred times as much as in a matrix product
                if sum(look.unsure for look in looks) <= found.numel() / 1024:
                    t2i.settle(looks[0], part, images[rows])
                    i2t.settle(looks[1], images[rows], part)
                    continue
                rough = None  # embeddings this similar leave many pairs open in other tiles, too
            found = scores(images[rows], part)  # [n, c]
            found[mine[here] - row, here] = float("-inf")
            t2i.settle(t2i.look(found.T, at))
            i2t.settle(i2t.look(found, row))
    return t2i.ranks(), i2t.ranks()


def _bfloat16_pays(images: Tensor, captions: Tensor, scores: Scores) -> bool:
    """Whether bfloat16 products are faster here; without hardware support they are slower than float32."""
    sides = (images, captions), (images.bfloat16(), captions.bfloat16())
    # the minimum of five: the first call warms up, and others may be disturbed
    exact, rough = (min(timeit.repeat(partial(scores, *side), number=1, repeat=5)) for side in sides)
    return rough < exact / 1.5


class _Rough:
    """Vectors in bfloat16, with a bound on the error of their products."""

    def __init__(self, exact: Tensor) -> None:
        self.values = exact.bfloat16()  # [.., D]
        kept = self.values.float()
        self.norm, self.lost = kept.norm(dim=1).max().item(), (exact - kept).norm(dim=1).max().item()

    def error(self, other: _Rough) -> float:
        """Bound on the error: Cauchy-Schwarz for the rounding of the inputs, plus that of the sum and of the result."""
        inputs = self.norm * other.lost + self.lost * other.norm + self.lost * other.lost
        return inputs + self.norm * other.norm * (self.values.shape[1] * 2**-24 + 2**-8)


@dataclass
class _Look:
    at: int  # the first right one of the tile
    rows: Tensor  # [r] rows of the tile in which a score may be above the right one
    scores: Tensor  # [r, c] of these
    limits: Tensor  # [2, r, 1] scores above the first are surely above the right one, above the second perhaps
    counts: Tensor  # [2, r] of scores above each
    unsure: int  # how many lie between the two


class _Before:
    """Counts, tile by tile, the scores above each right one and those within TIE of it."""

    def __init__(self, right: Tensor) -> None:
        self.limits = torch.stack([right + TIE, right - TIE])  # [2, R]
        self.above = torch.zeros(2, len(right), dtype=torch.long)

    def look(self, found: Tensor, at: int, error: float = 0.0) -> _Look:
        """Inspects scores [r, c] for the right ones from `at` on, each with an error of at most `error`."""
        limits = self.limits[:, at : at + len(found)] + torch.tensor([[error], [-error]])
        rows = (found.amax(1) > limits[1]).nonzero()[:, 0]  # usually few
        scores, limits, ones = found[rows].float(), limits[:, rows, None], torch.ones(found.shape[1])
        # as numbers, and by a product: sums of booleans take ten times as long; exact up to 2^24
        counts = torch.stack([torch.gt(scores, limit, out=torch.empty_like(scores)) @ ones for limit in limits]).long()
        return _Look(at, rows, scores, limits, counts, int((counts[1] - counts[0]).sum()))

    def settle(self, look: _Look, right: Tensor | None = None, others: Tensor | None = None) -> None:
        """Adds the counts; undecided pairs are recomputed from the tile's vectors [r, D] and [c, D] if given."""
        if right is None:
            self.above[:, look.at + look.rows] += look.counts
            return
        self.above[:, look.at + look.rows] += look.counts[0]
        some = (look.counts[1] > look.counts[0]).nonzero()[:, 0]
        scores, (high, low) = look.scores[some], look.limits[:, some]
        pairs = ((scores > low) & (scores <= high)).nonzero()  # [p, 2]
        for row, column in (part.T for part in pairs.split(PAIRS)):
            row = look.rows[some[row]]
            now = (right[row] * others[column]).sum(1)
            for limit, above in zip(self.limits[:, look.at + row], self.above, strict=True):
                above.index_add_(0, look.at + row, (now > limit).long())

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


def maxsim(images: Tensor, captions: Tensor) -> Tensor:
    """Late interaction (ColBERT, arXiv 2004.12832): each caption token's best image token, averaged over the caption's.

    Unit tokens [N, k, D], [C, k, D] → [N, C]
    """
    alike = torch.einsum("nid,cjd->ncij", images, captions)
    return alike.max(2).values.mean(2)
