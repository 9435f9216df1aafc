"""Dataclasses of tensors that data loaders move to a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", bound="Movable")


@dataclass
class Movable:
    """`to` and `pin_memory` for a dataclass of tensors, as PyTorch's and accelerate's data loaders call them."""

    def to(self: T, device: torch.device | str, non_blocking: bool = False, **_: Any) -> T:
        """The same on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: T) -> T:
        """The same in memory that is copied to the device without waiting."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        # a data loader's workers send each tensor as an open file of its own, of which there may be few
        arrays = self._map(lambda tensor: tensor.numpy() if tensor.device.type == "cpu" else tensor)
        return dict(vars(arrays))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self).update(vars(self._map(torch.from_numpy, np.ndarray)))

    def _map(self: T, change: Callable[[Any], Any], kind: type = Tensor) -> T:
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            if isinstance(value, Movable):
                return value._map(change, kind)
            return change(value) if isinstance(value, kind) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})
