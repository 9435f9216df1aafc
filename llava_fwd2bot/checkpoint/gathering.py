"""Parameters in one piece, where FSDP or DeepSpeed's ZeRO-3 holds them in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_zero3(parameter: Tensor) -> bool:
    """Whether DeepSpeed holds the parameter in parts; outside of its layer's call it is then empty."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(parameter.ds_shape) if is_zero3(parameter) else parameter.shape


@contextmanager
def whole(*parameters: Tensor) -> Iterator[list[Tensor]]:
    """The parameters in one piece, for as long as the block runs. Every rank must enter it."""
    if not any(is_zero3(p) for p in parameters):
        yield [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(list(parameters)):
        yield list(parameters)
