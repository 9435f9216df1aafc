"""A query transformer: learned queries attend to the dense tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .base import Compressor


class QueryTransformer(nn.Module):
    """Queries attend to the dense tokens through one block; the first j queries give the first j outputs.

    Queries do not see each other, so a prefix of the outputs is the output of the prefix.

    Args:
        size: D. queries: k. heads: attention heads; D must be divisible by it.
        places: learned places for this many dense tokens, or None: dense tokens of vision transformers carry theirs.
    """

    def __init__(self, size: int, queries: int, heads: int, places: int | None = None) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(queries, size))
        self.places = None if places is None else nn.Parameter(0.02 * torch.randn(places, size))
        self.norm_in, self.norm_query, self.norm_out = nn.LayerNorm(size), nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, dense: Tensor, j: int, padding: Tensor | None = None) -> Tensor:
        """Dense tokens [M, n, D] and the mask of padding [M, n] → [M, j, D]"""
        values = self.norm_in(dense)
        keys = values if self.places is None else values + self.places
        queries = self.queries[:j].expand(len(dense), -1, -1)
        seen, _ = self.attention(self.norm_query(queries), keys, values, padding, need_weights=False)
        out = queries + seen
        return out + self.feed_forward(self.norm_out(out))


class Query(Compressor):
    name = "query"
    about = "a trained block of k learned queries that attend to the dense tokens"
    source = "MQT-LLaVA, arXiv 2405.19315"

    def build(self, size: int, k: int) -> nn.Module:
        heads = max(h for h in range(1, max(size // 64, 1) + 1) if size % h == 0)
        return QueryTransformer(size, k, heads)

    def images(self, model: Any, dense: Sequence[Tensor], j: int) -> Tensor:
        block = model.fwd2bot.compressor
        lengths = torch.tensor([len(v) for v in dense], device=dense[0].device)
        rows = pad_sequence([v.to(block.queries.dtype) for v in dense], batch_first=True)  # [M, n, D]
        if int(lengths.min()) == rows.shape[1]:
            return block(rows, j)
        return block(rows, j, torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None])
