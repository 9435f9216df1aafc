"""Rows that follow from a seed, for caches that are damaged, killed or written to at once."""

from __future__ import annotations

import hashlib

import torch
from torch.nn.functional import normalize

from llava_fwd2bot.cache.format import CacheSettings

K, D, ROWS = 6, 32, 16  # of a summary; rows of a commit
SETTINGS = CacheSettings("f" * 64, K, D, "float16", "mean")


def content(name: str, turn: int = 0) -> str:
    """The SHA-256 of a file of that name; `turn` counts its changes."""
    return hashlib.sha256(f"{name} {turn}".encode()).hexdigest()


def about(ids: list[str], turn: int = 0, **more: object) -> list[dict]:
    row = {"bytes": 10, "modified": 1, "width": 4, "height": 3}
    return [{**row, "sha256": content(name, turn), "source": f"/nowhere/{name}", **more} for name in ids]


def rows(n: int, seed: int = 0) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Ids, summaries [n, K, D] and unit vectors [n, D] that follow from the seed."""
    summary = torch.randn(n, K, D, generator=torch.Generator().manual_seed(seed))
    return [f"{seed}-{i}" for i in range(n)], summary, normalize(summary.mean(1), dim=-1)
