"""The losses: pure functions on tensors. C pairs, N labelled tokens, D hidden size, V vocabulary, W ranks."""

from __future__ import annotations

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


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over unit vectors, the other pairs being the negatives (VladVA, section 3).

    Args:
        images, texts: unit vectors, row i of one belongs to row i of the other, [C, D].
        logit_scale: ln(1 / temperature), a scalar.

    Returns:
        The loss, and the retrieval accuracy in the batch (both ways, averaged).
    """
    logits = logit_scale.to(images.dtype).exp() * images @ texts.T  # [C, C]
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    with torch.no_grad():
        hits = (logits.argmax(1) == target).float().mean() + (logits.argmax(0) == target).float().mean()
    return loss, hits / 2


def gather_with_grad(rows: Tensor) -> Tensor:
    """The rows of all ranks, in order of rank, [C, D] → [sum of C, D]; C may differ from rank to rank, and be 0.

    Every rank must call it. Each rank then computes the loss over all pairs; the gradient of the gather sums over
    ranks, and DistributedDataParallel's mean makes that the gradient of one rank with the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=rows.device)
    sizes[dist.get_rank()] = len(rows)
    dist.all_reduce(sizes)
    sizes = sizes.tolist()
    if not any(sizes):
        return rows
    if torch.is_grad_enabled() and not rows.requires_grad:
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
