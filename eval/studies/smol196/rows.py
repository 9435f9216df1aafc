"""Rows of the answer pass: what stands for the image, then questions and answers that do not see each other.

Layout: [prefix ; slots ; text], or with stored keys and values [(past) ; prefix ; text]. A question's positions go on
from those of the slots that are seen, so that each of a row's questions stands as if it were alone.

Shapes: B rows, P tokens of the prefix, S slots, T tokens of text, L = P + S + T (and what fills it up to eights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.studies.smol196.model import KeyValues, Language


@dataclass
class Memory:
    """What the answer pass reads of pictures: slots [B, S, D], or keys and values of S positions; and how many."""

    slots: Tensor | None
    past: KeyValues | None
    k: Tensor  # [B] the first k are seen
    start: int = 0  # the position after `past`

    @property
    def size(self) -> int:
        return self.slots.shape[1] if self.past is None else self.past[0][0].shape[2]

    def pick(self, rows: Tensor, k: Tensor) -> Memory:
        slots = None if self.slots is None else self.slots[rows]
        past = None if self.past is None else [(a[rows], b[rows]) for a, b in self.past]
        return Memory(slots, past, k, self.start)


@dataclass
class Rows:
    """Text of B rows, on the device.

    `segment` 0 is no text; `offset` counts from 0 in each segment; `ahead` are the places in the flattened [B, T] whose
    next token is to be told, `targets` those tokens.
    """

    tokens: Tensor  # [B, T]
    segment: Tensor  # [B, T]
    offset: Tensor  # [B, T]
    ahead: Tensor  # [N]
    targets: Tensor  # [N]


def offsets(segment: Tensor) -> Tensor:
    """Places within each segment, from 0: [B, T]"""
    place = torch.arange(segment.shape[1]).expand_as(segment)
    begins = torch.ones_like(segment, dtype=torch.bool)
    begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
    return place - place.masked_fill(~begins, 0).cummax(1).values


def answer_rows(
    language: Language, prefix: Tensor, memory: Memory, rows: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings [B, L, D], positions [B, L], attention bias [B, 1, L, past + L]; `ahead` in the flattened rows [N]."""
    batch, text = rows.tokens.shape
    device, dtype = rows.tokens.device, language.dtype
    slots, past = (0, memory.size) if memory.past is not None else (memory.size, 0)
    before = len(prefix) + slots
    fill = -(past + before + text) % 8  # the fast attention kernels want it
    tokens, segment, offset = (F.pad(x, (0, fill)) for x in (rows.tokens, rows.segment, rows.offset))
    parts = [language.words[prefix].to(dtype).expand(batch, -1, -1), language.words[tokens].to(dtype)]
    if memory.past is None:
        parts.insert(1, memory.slots.to(dtype))
    embeds = torch.cat(parts, dim=1)
    length = embeds.shape[1]

    place = torch.arange(before, device=device).expand(batch, -1)
    seen = memory.k[:, None] if past == 0 else 0
    positions = torch.cat([place, len(prefix) + seen + offset], dim=1) + memory.start

    own = torch.cat([segment.new_zeros(batch, past + before), segment.masked_fill(segment == 0, 255)], dim=1)
    visible = torch.ones(batch, past + length, dtype=torch.bool, device=device)
    first = len(prefix) if past == 0 else 0
    visible[:, first : first + memory.size] = torch.arange(memory.size, device=device) < memory.k[:, None]
    order = torch.arange(past + length, device=device)
    query = own[:, past:, None]
    allowed = (order <= order[past:, None]) & visible[:, None] & ((own[:, None] == 0) | (own[:, None] == query))
    bias = torch.zeros(batch, 1, length, past + length, dtype=dtype, device=device)
    bias.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)

    at = rows.ahead // text * length + before + rows.ahead % text
    return embeds, positions, bias, at
