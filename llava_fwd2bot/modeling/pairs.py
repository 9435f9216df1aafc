"""Which pairs of a batch are equal: LLaVA's data have several records of one picture, and captions that repeat.

Pairs are distinguished by content, so that batches of any collator are right. Nothing here waits for the device.
C pairs, M images, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # numbers that are hashed at once, in 8 bytes each: a large batch needs little memory
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # splitmix64's constants, as signed numbers
_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_keys(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """A 64-bit key of the content of each row, [M, …] → [M]; rows may differ in shape when given one by one.

    Zeros at the end of a row do not count: processors fill up the crops of an image to those of the largest one.
    """
    if not isinstance(rows, Tensor):
        return torch.cat([content_keys(row[None]) for row in rows])
    rows = rows.detach().flatten(1) if rows.dim() > 1 else rows.detach()[:, None]  # [M, P]
    weights = _spread(torch.arange(1, rows.shape[1] + 1, device=rows.device)) | 1  # [P]
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    return _spread(torch.cat([(_spread(_bits(part)) * weights).sum(1) for part in rows.split(step)]))


def text_keys(ids: Tensor, mask: Tensor) -> Tensor:
    """A key of each text, [C, L] → [C]; equal texts have equal keys wherever their padding stands."""
    mask = mask.bool()
    place = mask.long().cumsum(1)  # [C, L], from 1
    return _spread((_spread(ids.long() + 1) * (_spread(place) | 1) * mask).sum(1))


def join_keys(keys: Sequence[Tensor]) -> Tensor:
    """One key out of several for each row, each [M]."""
    joined = torch.zeros_like(keys[0])
    for key in keys:
        joined = _spread(joined * 3 + key)
    return joined


def _bits(values: Tensor) -> Tensor:
    """The numbers' bits as int64; 0 for 0."""
    if values.is_floating_point():
        values = values.contiguous().view(_OF_SIZE[values.element_size()])
    return values.long()


def _spread(x: Tensor) -> Tensor:
    """Mixes the bits of int64 numbers, one to one, 0 to 0; multiplication wraps around."""
    for odd, shift in zip(_ODD, (30, 27, 31), strict=True):
        x = x * odd
        x ^= x >> shift
    return x
