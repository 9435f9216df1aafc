"""`fwd2bot eval retrieval`: images by captions and captions by images, R@1, 5 and 10, by exact search.

The pooled vector is what training compares. `--maxsim` compares the k summary tokens one by one (late interaction, our
choice): k² times the work and k times the memory of the pooled vector.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import torch
from torch import Tensor

from ..bottleneck import embed, maxsim
from .datasets import Captioned
from .encode import Encoder
from .search import Scores, cosine, ranks, recalls, unit_tokens


def retrieval(
    encoder: Encoder, data: Captioned, ks: list[int] | None = None, late: bool = False
) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """The figures for each number of summary tokens, from one encoding.

    Args:
        ks: default: all that the model has.
        late: also by MaxSim.

    Returns:
        (rows, the ranks that they are made of).
    """
    k = encoder.model.fwd2bot_config.num_summary_tokens
    images, texts = encoder.images(data.paths), encoder.texts([text for said in data.captions for text in said])
    owner = torch.tensor([i for i, said in enumerate(data.captions) for _ in said])
    rows, places = [], {}
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
            places[f"{name} k={j}"] = t2i.tolist()
    return rows, places


def about(data: Captioned) -> dict[str, Any]:
    """`of`: by which two results are known to be of the same images and captions, wherever these lie."""
    told = json.dumps([[path.name, *said] for path, said in zip(data.paths, data.captions, strict=True)])
    found = {"dataset": data.name, "images": len(data), "captions": sum(map(len, data.captions))}
    return {**found, "of": hashlib.sha256(told.encode()).hexdigest()[:16]}
