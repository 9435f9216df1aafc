"""`fwd2bot eval retrieval`: R@1, 5 and 10 of images by captions and of captions by images, by exact search.

The contrastive loss trains the pooled vector. `--maxsim` compares the k summary tokens one by one (late interaction,
our choice), with k² times the work and k times the memory. It lowered R@1 (eval/results/rerank.md).
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import torch
from torch import Tensor

from ..bottleneck import embed
from .datasets import Captioned
from .encode import Encoder
from .search import Scores, cosine, maxsim, ranks, recalls, unit_tokens


def retrieval(
    encoder: Encoder, data: Captioned, ks: list[int] | None = None, late: bool = False
) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """R@n for each k, from one encoding.

    Args:
        ks: numbers of summary tokens; default: all of them.
        late: also rank by MaxSim.

    Returns:
        (rows, {way of scoring: rank of each caption's image, from 0}).
    """
    k = encoder.model.fwd2bot_config.num_summary_tokens
    images, texts = encoder.images(data.paths), encoder.texts([text for captions in data.captions for text in captions])
    owner = torch.tensor([i for i, captions in enumerate(data.captions) for _ in captions])
    rows, ranks_of = [], {}
    pooling = encoder.model.fwd2bot_config.pooling
    for j in ks or [k]:
        ways: list[tuple[str, Scores, Tensor, Tensor]] = []
        ways.append(("pooled", cosine, *(embed(s[:, :j].float(), pooling) for s in (images, texts))))
        if late:
            ways.append(("maxsim", maxsim, *(unit_tokens(s[:, :j]) for s in (images, texts))))
        for name, scores, left, right in ways:
            start = time.perf_counter()
            t2i, i2t = ranks(left, right, owner, scores)
            row = {"k": j, "by": name, **recalls(t2i, i2t), "seconds": round(time.perf_counter() - start, 3)}
            rows.append({**row, "bytes_per_image": left[0].numel() * 2})
            ranks_of[f"{name} k={j}"] = t2i.tolist()
    return rows, ranks_of


def about(data: Captioned) -> dict[str, Any]:
    """Description of the items; `of` is a digest of images and captions, equal for results on the same items."""
    identity = json.dumps([[path.name, *captions] for path, captions in zip(data.paths, data.captions, strict=True)])
    found = {"dataset": data.name, "images": len(data), "captions": sum(map(len, data.captions))}
    return {**found, "of": hashlib.sha256(identity.encode()).hexdigest()[:16]}
