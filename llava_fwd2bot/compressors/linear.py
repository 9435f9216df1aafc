"""Compressors without a pass and without parameters: averages of the dense tokens, or some of them as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .averages import nested_averages
from .base import Compressor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too
def cached(make: Callable[[int, int], Tensor], count: int, j: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`make(count, j)`, [j, count], copied to where it is used once."""
    return make(count, j).to(device, dtype)


class Linear(Compressor):
    """A fixed matrix of weights over an image's dense tokens."""

    def weights(self, count: int, j: int) -> Tensor:
        """[j, count]: what each of j tokens takes of `count` dense tokens; each row sums to 1."""
        raise NotImplementedError

    def averages(self, dense: Sequence[Tensor], j: int) -> list[Tensor]:
        """The weighted sums of each image's dense tokens, M × [n_i, D] → M × [j, D]."""
        return [cached(self.weights, len(v), j, v.device, v.dtype) @ v for v in dense]

    def images(self, model: Any, dense: Sequence[Tensor], j: int) -> Tensor:
        self._check(min(len(v) for v in dense), j)
        return torch.stack(self.averages(dense, j))

    def _check(self, count: int, j: int) -> None:
        if j > count:
            raise ValueError(f"The compressor {self.name!r} cannot make {j} tokens of {count} dense tokens.")


class Averages(Linear):
    name = "average"
    about = "averages of the dense tokens, from the whole image to ever smaller parts of it"
    source = "our choice; see compressors/averages.py"

    def weights(self, count: int, j: int) -> Tensor:
        return nested_averages(count, j)


class Pool(Linear):
    name = "pool"
    about = "averages over the cells of a grid of k cells"
    source = "Matryoshka Multimodal Models, arXiv 2405.17430"
    prefix = False

    def weights(self, count: int, j: int) -> Tensor:
        self._check(count, j)  # some cells would be the same; a residual comes here alone
        side = math.isqrt(count)
        if side * side != count:  # crops or separators: cells of a line
            return F.adaptive_avg_pool1d(torch.eye(count)[None], j)[0].T
        rows = max(r for r in range(1, math.isqrt(j) + 1) if j % r == 0)  # the squarest grid of j cells
        grid = torch.eye(count).view(count, side, side)
        return F.adaptive_avg_pool2d(grid, (rows, j // rows)).flatten(1).T


class Uniform(Linear):
    name = "uniform"
    about = "every (n / k)-th dense token, as it is"
    source = "uniform pruning"
    prefix = False

    def weights(self, count: int, j: int) -> Tensor:
        at = ((torch.arange(j, dtype=torch.float64) + 0.5) * count / j).long()
        return F.one_hot(at, count).float()


class Random(Linear):
    name = "random"
    about = "k dense tokens at places drawn once, the same for all images of n tokens"
    source = "random pruning"

    def weights(self, count: int, j: int) -> Tensor:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        return F.one_hot(order[:j], count).float()
