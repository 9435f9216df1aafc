"""The losses: pure functions on tensors. C pairs, N labelled tokens, D hidden size, V vocabulary, W ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MAX_LOGIT_SCALE = 4.6052  # ln 100: a temperature of at least 0.01, as in CLIP


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross entropy, mean over the labelled tokens (paper, equation 2).

    Args:
        logits: at the positions whose next token is labelled, [N, V].
        targets: those next tokens, [N].
    """
    return F.cross_entropy(_wide(logits), targets)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits [N, V], mean over the tokens (our choice). No gradient to the teacher."""
    log_student = F.log_softmax(_wide(student), dim=-1)
    log_teacher = F.log_softmax(_wide(teacher.detach()), dim=-1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


@dataclass
class Candidates:
    """What each pair is compared with: the distinct texts for its image, the distinct images for its text.

    A text that is known to belong to an image is not its negative, also where it stands in another pair; a candidate
    that comes several times counts once, and so does a pair.
    """

    excluded: Tensor  # [C, C] True where text j is known to belong to image i, except on the diagonal
    image_weight: Tensor  # [C] 1 / how often the image comes
    text_weight: Tensor  # [C]
    pair_weight: Tensor  # [C]

    @classmethod
    def of(cls, image_keys: Tensor, text_keys: Tensor, dtype: torch.dtype) -> Candidates:
        """From a key of each pair's image and of its text, both [C]."""
        same_image = image_keys[:, None] == image_keys  # [C, C]
        same_text = text_keys[:, None] == text_keys  # [C, C]
        count = len(image_keys)
        number = torch.arange(count, device=image_keys.device)
        image, text = (torch.where(same, number, count).amin(1) for same in (same_image, same_text))  # [C] first equal
        belongs = torch.zeros_like(same_image)
        belongs[image, text] = True
        excluded = belongs[image][:, text]  # [C, C]
        excluded.fill_diagonal_(False)
        weights = (1 / same.sum(1).to(dtype) for same in (same_image, same_text, same_image & same_text))
        return cls(excluded, *weights)


def contrastive_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, candidates: Candidates | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over unit vectors, the other pairs being the negatives (VladVA, section 3).

    Computed in float32 or wider, also under autocast: at a temperature of 0.01 bfloat16 is off by a quarter.

    Args:
        images, texts: unit vectors, row i of one belongs to row i of the other, [C, D].
        logit_scale: ln(1 / temperature), one number.
        candidates: which pairs are equal; None takes all for different.

    Returns:
        The loss, and the retrieval accuracy in the batch (both ways, averaged) of the pairs that have a negative; NaN
        where none has. Both are those of the distinct pairs.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = _wide(images), _wide(texts)
        logits = logit_scale.to(images.dtype).exp() * images @ texts.T  # [C, C]
        target = torch.arange(len(logits), device=logits.device)
        if candidates is None:
            candidates = Candidates.of(target, target, logits.dtype)
        weight = candidates.pair_weight  # [C]
        loss, hits, compared = 0.0, 0.0, 0.0
        for way, excluded, counts in (
            (logits, candidates.excluded, candidates.text_weight),
            (logits.T, candidates.excluded.T, candidates.image_weight),
        ):
            way = way.masked_fill(excluded, float("-inf"))
            others = counts.log().expand_as(way).clone().fill_diagonal_(0.0)  # a pair's own candidate counts once
            loss = loss + weight @ F.cross_entropy(way + others, target, reduction="none")
            with torch.no_grad():
                counted = weight * (excluded.sum(1) < len(logits) - 1)  # [C] 0 for pairs that nothing is compared with
                hits = hits + counted @ (way.argmax(1) == target).to(way.dtype)
                compared = compared + counted.sum()
        return loss / (2 * weight.sum()), hits / compared


def gather_sizes(count: int, device: torch.device) -> list[int]:
    """How many rows each rank has. Every rank must call it."""
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    sizes[dist.get_rank()] = count
    dist.all_reduce(sizes)
    return sizes.tolist()


def gather_with_grad(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks, in order of rank, [C, D] → [sum of C, D]; C may differ from rank to rank, and be 0.

    Every rank must call it, with rows of one dtype. Each rank then computes the loss over all pairs; the gradient of
    the gather sums over ranks, and DistributedDataParallel's mean makes that the gradient of one rank with the whole
    batch.

    Args:
        sizes: C of each rank, where it is known already.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    sizes = gather_sizes(len(rows), rows.device) if sizes is None else sizes
    if not any(sizes):
        return rows
    if rows.is_floating_point() and torch.is_grad_enabled() and not rows.requires_grad:
        rows = rows.detach().requires_grad_()  # a rank without pairs must still join the collective of backward
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))  # collectives want equal shapes
    return torch.cat([part[:size] for part, size in zip(_AllGather.apply(padded), sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    # torch.distributed.nn.all_gather takes part of its backward through reduce_scatter, which gloo does not have

    @staticmethod
    def forward(ctx, rows: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        total = torch.stack(grads)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
