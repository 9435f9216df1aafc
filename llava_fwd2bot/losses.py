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
    return F.cross_entropy(wide(logits), targets)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits [N, V], mean over the tokens (our choice). No gradient to the teacher."""
    log_student = F.log_softmax(wide(student), dim=-1)
    log_teacher = F.log_softmax(wide(teacher.detach()), dim=-1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


@dataclass
class Candidates:
    """What each pair is compared with: the distinct texts for its image, the distinct images for its text.

    A text that is known to belong to an image is not its negative, also where it stands in another pair; a candidate
    that comes several times counts once, and so does a pair.
    """

    image: Tensor  # [C] number of the pair's image; equal images have equal numbers, below C
    text: Tensor  # [C]
    image_weight: Tensor  # [C] 1 / how often the image comes
    text_weight: Tensor  # [C]
    pair_weight: Tensor  # [C]

    @classmethod
    def of(cls, image_keys: Tensor, text_keys: Tensor, dtype: torch.dtype) -> Candidates:
        """From a key of each pair's image and of its text, both [C]."""
        (image, images), (text, texts) = _numbered(image_keys), _numbered(text_keys)
        _, pairs = _numbered(image * len(image) + text)
        return cls(image, text, *(1 / count.to(dtype) for count in (images, texts, pairs)))

    def flipped(self) -> Candidates:
        """The same for the way from texts to images."""
        return Candidates(self.text, self.image, self.text_weight, self.image_weight, self.pair_weight)

    def excluded(self, first: int, rows: int) -> Tensor:
        """For pairs `first` and on, [rows, C]: True where text j is known to belong to image i, except i = j."""
        count, own = len(self.image), self.image[first : first + rows]  # [R]
        place = torch.full_like(self.image, rows)  # of each image among the rows; all others share one more
        place[own] = torch.arange(rows, device=own.device)
        belongs = torch.zeros((rows + 1) * count, dtype=torch.bool, device=own.device)
        # not belongs[…] = True, which copies the value to the GPU and waits for that
        belongs.index_fill_(0, place[self.image] * count + self.text, True)
        excluded = belongs.view(rows + 1, count)[place[own]][:, self.text]  # [R, C]
        excluded.diagonal(first).fill_(False)
        return excluded


def _numbered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A number below C of each key, equal for equal keys, and how often the key comes; all [C]."""
    ordered, order = keys.sort()
    new = torch.ones_like(keys)
    new[1:] = ordered[1:] != ordered[:-1]
    number = torch.empty_like(keys).index_copy(0, order, new.cumsum(0) - 1)
    return number, torch.zeros_like(keys).index_add(0, number, torch.ones_like(keys))[number]


def contrastive_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, candidates: Candidates | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over unit vectors, the other pairs being the negatives (VladVA, section 3).

    Computed in float32 or wider, also under autocast: at a temperature of 0.01 bfloat16 is off by a quarter. It holds
    matrices of C × C; `modeling.blocks` computes the same for large batches.

    Args:
        images, texts: unit vectors, row i of one belongs to row i of the other, [C, D].
        logit_scale: ln(1 / temperature), one number.
        candidates: which pairs are equal; None takes all for different.

    Returns:
        The loss, and the retrieval accuracy in the batch (both ways, averaged) of the pairs that have a negative; NaN
        where none has. Both are those of the distinct pairs.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = wide(images), wide(texts)
        logits = logit_scale.to(images.dtype).exp() * images @ texts.T  # [C, C]
        if candidates is None:
            target = torch.arange(len(logits), device=logits.device)
            candidates = Candidates.of(target, target, logits.dtype)
        ways = one_way(logits, candidates), one_way(logits.T, candidates.flipped())
        loss, hits, compared = (sum(parts) for parts in zip(*ways, strict=True))
        return loss / (2 * candidates.pair_weight.sum()), hits / compared


def one_way(logits: Tensor, candidates: Candidates, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of InfoNCE from pairs `first` and on to all candidates: loss, hits, and the pairs that these are of.

    Args:
        logits: [R, C], of R queries.
        candidates: of all C pairs; `flipped` where the queries are texts.
    """
    rows = len(logits)
    target = torch.arange(first, first + rows, device=logits.device)  # [R]
    weight, excluded = candidates.pair_weight[first : first + rows], candidates.excluded(first, rows)
    logits = logits.masked_fill(excluded, float("-inf"))
    others = candidates.text_weight.log().expand_as(logits).clone()  # [R, C]
    others.diagonal(first).zero_()  # a pair's own candidate counts once
    loss = weight @ F.cross_entropy(logits + others, target, reduction="none")
    with torch.no_grad():
        counted = weight * (excluded.sum(1) < logits.shape[1] - 1)  # [R] 0 for pairs that nothing is compared with
        hits = counted @ (logits.argmax(1) == target).to(logits.dtype)
    return loss, hits, counted.sum()


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


def wide(logits: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()
