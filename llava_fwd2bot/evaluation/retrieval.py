"""`fwd2bot eval retrieval`: R@1, 5 and 10 of images by captions and of captions by images, by exact search.

The contrastive loss trains the pooled vector. `--maxsim` compares the k summary tokens one by one (late interaction,
our choice), with k² times the work and k times the memory. It lowered R@1 (eval/results/rerank.md).

Shapes: N images, C captions, k tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..bottleneck import embed
from .datasets import Captioned
from .encode import Encoder
from .results import Score, digest

Scores = Callable[[Tensor, Tensor], Tensor]  # (images […N], captions […C]) → [N, C]
TIE = 1e-6
BLOCK = 2**25  # scores at once
AT = (1, 5, 10)


def retrieval(encoder: Encoder, data: Captioned, ks: Sequence[int], late: bool = False) -> list[Score]:
    """R@n for each k, from one encoding. The items are the captions: whether each ranks its image first.

    Args:
        late: also rank by MaxSim.
    """
    images, texts = encoder.images(data.paths), encoder.texts([text for captions in data.captions for text in captions])
    groups = [i for i, captions in enumerate(data.captions) for _ in captions]
    owner, pooling, found = torch.tensor(groups), encoder.model.fwd2bot_config.pooling, []
    for k in ks:
        left, right = (embed(s[:, :k].float(), pooling) for s in (images, texts))
        ways = {"": ranks(left, right, owner)}
        if late:
            ways["maxsim"] = ranks(unit_tokens(images[:, :k]), unit_tokens(texts[:, :k]), owner, maxsim)
        for by, (t2i, i2t) in ways.items():
            hits = {str(i): float(rank < 1) for i, rank in enumerate(t2i.tolist())}
            counts = {f"i2t_r{n}": len(data) for n in AT}
            found.append(Score(recalls(t2i, i2t), hits, counts, groups, k=k, by=by))
    return found


def about(data: Captioned) -> dict[str, Any]:
    """Description of the items; `of` is a digest of images and captions, equal for results on the same items."""
    identity = json.dumps([[path.name, *captions] for path, captions in zip(data.paths, data.captions, strict=True)])
    found = {"dataset": data.name, "images": len(data), "captions": sum(map(len, data.captions))}
    return {**found, "of": digest(identity)}


def cosine(images: Tensor, captions: Tensor) -> Tensor:
    """Unit vectors [N, D], [C, D] → [N, C]"""
    return images @ captions.T


def maxsim(images: Tensor, captions: Tensor) -> Tensor:
    """Late interaction (ColBERT, arXiv 2004.12832): each caption token's best image token, averaged over the caption's.

    Unit tokens [N, k, D], [C, k, D] → [N, C]
    """
    alike = torch.einsum("nid,cjd->ncij", images, captions)
    return alike.max(2).values.mean(2)


def unit_tokens(summary: Tensor) -> Tensor:
    return F.normalize(summary.float(), dim=-1)


def ranks(
    images: Tensor, captions: Tensor, owner: Tensor, scores: Scores = cosine, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Ranks from 0: of the right image among images for each caption [C], of the right caption for each image [N].

    Scores within TIE of the right one count half, so that equal embeddings find nothing. The right caption of an image
    is the best of its own.

    Args:
        owner: the image of each caption, [C].

    Raises:
        ValueError: an embedding is not finite, which would rank first.
    """
    own = torch.cat(
        [_own(images[o], c, scores) for o, c in zip(owner.split(4096), captions.split(4096), strict=True)]
    )  # [C]
    if not own.isfinite().all():
        raise ValueError("Some embeddings are not finite: the checkpoint or a file in --work is damaged.")
    best = torch.full((len(images),), float("-inf")).scatter_reduce(0, owner, own, "amax")  # [N]
    t2i, i2t = torch.zeros(2, len(owner), dtype=torch.long), torch.zeros(2, len(images), dtype=torch.long)
    cost = 1 if images.dim() == 2 else images.shape[1] * captions.shape[1]
    step = max(1, block // (len(images) * cost))
    for at in tqdm(range(0, len(owner), step), desc="search", unit="block", disable=len(owner) <= step):
        part = slice(at, at + step)
        found = scores(images, captions[part])  # [N, c]
        # a score can differ in its last bit between blocks: the right one is not compared with itself
        found[owner[part], torch.arange(found.shape[1])] = float("-inf")
        for row, margin in enumerate((TIE, -TIE)):  # surely above the right one; perhaps
            t2i[row, part] = (found > own[part] + margin).sum(0)
            i2t[row] += (found > best[:, None] + margin).sum(1)
    return tuple(sure + (perhaps - sure) // 2 for sure, perhaps in (t2i, i2t))


def _own(images: Tensor, captions: Tensor, scores: Scores) -> Tensor:
    """The score of each image with the caption beside it."""
    if images.dim() == 2:
        return (images * captions).sum(1)
    return torch.cat([scores(images[i : i + 1], captions[i : i + 1])[0] for i in range(len(images))])


def recalls(t2i: Tensor, i2t: Tensor, at: Sequence[int] = AT) -> dict[str, float]:
    """R@n both ways, [0, 1], of ranks from 0."""
    ways = (("t2i", t2i), ("i2t", i2t))
    return {f"{name}_r{n}": (before < n).double().mean().item() for name, before in ways for n in at}
