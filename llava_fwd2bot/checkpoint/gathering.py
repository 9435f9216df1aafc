"""Parameters in one piece, where FSDP or DeepSpeed's ZeRO-3 holds them in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(parameters)):
        yield list(parameters)


def is_split(model: nn.Module) -> bool:
    """Whether parameters of the model are held in parts, by FSDP or ZeRO-3."""
    return any(isinstance(p, DTensor) or is_zero3(p) for p in model.parameters())


def whole_weights(model: nn.Module, keep: bool = True, frozen: bool = False) -> dict[str, Tensor]:
    """The trained weights in one piece, on the CPU, by their names in the model. Every rank must call it.

    They are gathered one after the other, so that the device holds one more weight than before.

    Args:
        keep: False on the ranks that do not write; they get nothing.
        frozen: all weights.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or frozen:
            with whole(parameter) as (weight,):
                if keep:
                    found[name] = weight.detach().cpu().clone()
    return found


@torch.no_grad()
def fill(parameter: Tensor, weight: Tensor) -> None:
    """Puts a whole weight into a parameter that may be held in parts. Every rank must call it, with the same weight."""
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(weight.to(parameter), parameter.device_mesh, parameter.placements))
    elif is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(weight.to(parameter))
    else:
        parameter.copy_(weight)
