"""The contrastive loss of a large batch by blocks of rows, so that no C × C matrix is ever whole.

Each block is checkpointed: forward keeps the vectors alone, and backward computes the block's logits again. It is the
formula of `losses.one_way`; only sums are taken in another order. C pairs, D hidden size, R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..losses import Candidates, contrastive_loss, one_way, wide

WHOLE = 1024  # pairs up to which the whole matrices are small, and faster
_LOGITS = 1 << 20  # of a block
_LEAST_ROWS = 64  # smaller blocks spend their time reading the vectors


def block_rows(pairs: int) -> int:
    """How many rows of the logits of so many pairs are computed at once."""
    return pairs if pairs <= WHOLE else max(_LEAST_ROWS, _LOGITS // pairs)


def contrastive_loss_by_blocks(
    images: Tensor, texts: Tensor, logit_scale: Tensor, candidates: Candidates, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """`losses.contrastive_loss`, at most `rows` rows of its logits at a time; by default `block_rows`.

    A block takes about eight matrices of R × C in float32.
    """
    rows = block_rows(len(images)) if rows is None else rows
    if rows >= len(images):
        return contrastive_loss(images, texts, logit_scale, candidates)
    with torch.autocast(images.device.type, enabled=False):
        images, texts = wide(images), wide(texts)
        scale = logit_scale.to(images.dtype).exp()

        def block(queries: Tensor, others: Tensor, scale: Tensor, candidates: Candidates, first: int) -> tuple:
            return one_way(scale * queries @ others.T, candidates, first)

        sums = images.new_zeros(3)  # loss, hits, pairs compared
        for queries, others, way in ((images, texts, candidates), (texts, images, candidates.flipped())):
            for at, part in enumerate(queries.split(rows)):  # nothing is random in it
                found = checkpoint(
                    block, part, others, scale, way, at * rows, use_reentrant=False, preserve_rng_state=False
                )
                sums = sums + torch.stack(found)
        loss, hits, compared = sums
        return loss / (2 * candidates.pair_weight.sum()), hits / compared
