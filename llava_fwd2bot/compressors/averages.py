"""Nested averages of the dense tokens: a compressor, and a residual of Fwd2Bot (our choice)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept serves training too
def nested_averages(count: int, k: int) -> Tensor:
    """Weights of k averages over `count` dense tokens, [k, count]; the first j rows are those for j (our choice).

    Row 0 is the mean of all. Row j ≥ 1 is a Gaussian window of deviation 0.32 / √(j + 1) of the image's side around
    the j-th point of a low-discrepancy sequence (frac(j·φ₂⁻¹), frac(j·φ₂⁻²)), φ₂ ≈ 1.3247, so that any first j windows
    cover the image evenly, and later ones see finer. A square `count` is read as a grid in raster order; any other
    (crops, separators) as a line, with frac(j·φ⁻¹), φ ≈ 1.6180.
    """
    side = math.isqrt(count)
    across = [torch.arange(side) for _ in range(2)] if side * side == count else [torch.arange(count)]
    steps = (0.7548776662466927, 0.5698402909980532) if len(across) == 2 else (0.6180339887498949,)
    places = torch.stack(torch.meshgrid(*across, indexing="xy"), -1).view(count, -1).double()
    places = (places + 0.5) / len(across[0])  # [count, 1 or 2], in (0, 1)
    number = torch.arange(k, dtype=torch.float64)[:, None]
    centres = (0.5 + number * torch.tensor(steps, dtype=torch.float64)) % 1  # [k, 1 or 2]
    width = 0.32 / (number + 1).sqrt()  # [k, 1]
    apart = (centres[:, None] - places).square().sum(-1)  # [k, count]
    weights = (-apart / (2 * width.square())).softmax(dim=1)
    weights[0] = 1 / count
    return weights.float()
