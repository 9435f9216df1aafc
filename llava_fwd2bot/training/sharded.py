"""Runs whose weights or optimizer state are held in parts (FSDP, DeepSpeed's ZeRO), saved as runs of one process are.

A checkpoint has the trained weights in one piece, and an `optimizer.pt` of whole tensors in the order of the
optimizer's groups. So a run may be resumed with another number of processes, and by another way of splitting.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoint.gathering import is_zero3, whole

OPTIMIZER_NAME = "optimizer.pt"


Groups = list[list[nn.Parameter]]  # the parameters of each group of an optimizer


def whole_optimizer_state(optimizer: Any, own: Groups | None = None, keep: bool = True) -> dict[str, Any]:
    """The optimizer's `state_dict` with whole tensors on the CPU. Every rank must call it.

    Args:
        optimizer: of FSDP2, of DeepSpeed, or any other of PyTorch.
        own: the parameters of its groups as it was made, which DeepSpeed puts flat partitions in the place of.
        keep: False on the ranks that do not write; they get nothing.
    """
    groups, state = _groups(optimizer, own), {}
    for at, parameter in enumerate(_parameters(groups)):
        own = {name: _whole(value) for name, value in _state_of(optimizer, parameter).items()}
        if keep and own:
            state[at] = own
    if not keep:
        return {}
    entries, count = [], 0
    for group in groups:
        size = len(group["params"])
        entries.append({**group, "params": list(range(count, count + size))})
        count += size
    return {"state": state, "param_groups": entries}


def load_optimizer_state(optimizer: Any, saved: dict[str, Any], own: Groups | None = None) -> None:
    """Puts a state of whole tensors into an optimizer that may hold its own in parts. Every rank must call it.

    Raises:
        ValueError: it is of other parameters.
    """
    groups = _groups(optimizer, own)
    sizes = [[len(group["params"]) for group in of] for of in (groups, saved["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The optimizer's state is of groups of {sizes[1]} parameters, and this run trains {sizes[0]}: it was "
            "saved by a run with other settings."
        )
    zero = _zero_api(optimizer)
    if zero is not None:
        _make_states(optimizer, saved)
    for at, parameter in enumerate(_parameters(groups)):
        for name, value in saved["state"].get(at, {}).items():
            if zero is None:
                _state_of(optimizer, parameter)[name] = _part(value, parameter) if name != "step" else value.clone()
            elif name != "step":
                _set_zero(zero, parameter, value, name)
    for group, entries in zip(_inner(optimizer).param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in entries.items() if name != "params"})
    if zero is not None:
        steps = [state["step"] for state in saved["state"].values() if "step" in state]
        set_steps(optimizer, float(steps[0]) if steps else 0.0)


def set_steps(optimizer: Any, count: float) -> None:
    """Sets how many steps DeepSpeed's optimizer has taken, which it keeps for whole partitions."""
    for state in _inner(optimizer).state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], count) if isinstance(state["step"], Tensor) else int(count)


def refresh_master_weights(optimizer: Any, own: Groups) -> None:
    """Lets DeepSpeed's float32 weights, which it updates, be those that the model now has. Every rank must call it."""
    zero = _zero_api(optimizer)
    if zero is None:
        return
    for parameter in _parameters(_groups(optimizer, own)):
        with whole(parameter) as (weight,):
            value = weight.detach().float().clone()
        _set_zero(zero, parameter, value)


def save_optimizer(optimizer: Any, folder: str | Path, writes: bool, own: Groups | None = None) -> None:
    """Writes `optimizer.pt` into `folder` on the rank that `writes`. Every rank must call it."""
    state = whole_optimizer_state(optimizer, own, writes)
    if writes:
        torch.save(state, Path(folder, OPTIMIZER_NAME))


def read_optimizer(folder: str | Path) -> dict[str, Any]:
    return torch.load(Path(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)


# ---------------------------------------------------------------------- FSDP2's and DeepSpeed's
def _inner(optimizer: Any) -> Any:
    """The optimizer of PyTorch within what accelerate and DeepSpeed put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _deepspeed(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO optimizer in `optimizer`, or None."""
    while optimizer is not None:
        if type(optimizer).__module__.startswith("deepspeed."):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _zero_api(optimizer: Any) -> Any:
    if _deepspeed(optimizer) is None:
        return None
    import deepspeed.utils

    return deepspeed.utils


def _groups(optimizer: Any, own: Groups | None) -> list[dict[str, Any]]:
    """The optimizer's groups with the model's own parameters."""
    groups = _inner(optimizer).param_groups
    if _deepspeed(optimizer) is None or own is None:
        return groups
    return [{**group, "params": parameters} for group, parameters in zip(groups, own, strict=True)]


def _parameters(groups: list[dict[str, Any]]) -> Iterator[nn.Parameter]:
    for group in groups:
        yield from group["params"]


def _set_zero(zero: Any, parameter: nn.Parameter, value: Tensor, name: str | None = None) -> None:
    """Sets a state of the optimizer, or without a `name` the float32 weight, where DeepSpeed holds it."""
    value = value.to(torch.float32)
    if not is_zero3(parameter):
        value = value.view(parameter.shape)
        if name is None:
            zero.safe_set_full_fp32_param(parameter, value)
        else:
            zero.safe_set_full_optimizer_state(parameter, value, name)
        return
    # ZeRO-3 fills up the last parts, which its setter of whole values does not know
    size = parameter.ds_tensor.ds_numel
    padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    part = padded[size * dist.get_rank() :][:size].clone()
    if name is None:
        zero.safe_set_local_fp32_param(parameter, part)
    else:
        zero.safe_set_local_optimizer_state(parameter, part, name)


def _state_of(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    zero, inner = _zero_api(optimizer), _inner(optimizer)
    if zero is None:
        return inner.state[parameter]
    _link_states(optimizer)
    names = sorted({name for state in inner.state.values() for name in state})
    found = {name: zero.safe_get_full_optimizer_state(parameter, name) for name in names if name != "step"}
    steps = [state["step"] for state in inner.state.values() if "step" in state]
    if steps:
        found["step"] = torch.as_tensor(steps[0], dtype=torch.float32)
    return found


def _make_states(optimizer: Any, saved: dict[str, Any]) -> None:
    """Gives each of ZeRO's partitions the state that it would have after its first step."""
    names = {name for state in saved["state"].values() for name in state if name != "step"}
    inner, zero = _inner(optimizer), _deepspeed(optimizer)
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3's
    for flat in flats or [flat for group in inner.param_groups for flat in group["params"]]:
        if not inner.state[flat]:
            inner.state[flat].update({name: torch.zeros_like(flat) for name in names}, step=torch.tensor(0.0))
    _link_states(optimizer)


def _link_states(optimizer: Any) -> None:
    """ZeRO-1 and 2 find the state of a parameter in its partition; after a first step only in those of one group."""
    zero = _deepspeed(optimizer)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _whole(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _part(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.view(parameter.shape).to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
