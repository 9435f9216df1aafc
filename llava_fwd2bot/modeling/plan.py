"""What a training forward does with a batch, planned from ids and lengths alone.

Positions, which rows feed which loss, and which images are equal are known before the batch reaches the device. The
collator plans them on the CPU, and the forward then never waits for the device. A batch that comes without a plan is
planned in the forward by the same code.

Shapes as in bottleneck.py; U distinct images, C rows with a caption, A labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..bottleneck import Collapsed, Moves, collapse
from .pairs import text_keys

IGNORE = -100


def labelled_tokens(labels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> Tensor:
    """Where a label counts in the answer loss, [B, T] bool: on a real token that follows another one of its row."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return (labels != IGNORE) & real & (real.cumsum(1) > 1) & (input_ids != image_token_id)


@dataclass
class AnswerPlan(Moves):
    """The answer pass of one prefix length, over the rows with a labelled token."""

    collapsed: Collapsed  # of those rows; its origins are places in the whole batch
    labelled: Tensor  # [A] the packed tokens whose next token is labelled
    targets: Tensor  # [A] those next tokens


@dataclass
class CaptionPlan(Moves):
    """The captions, packed to the left, and which image each belongs to."""

    ids: Tensor  # [C, L]
    lengths: list[int]  # C, tokens of each
    image: Tensor  # [C] the first image of the caption's row
    keys: Tensor  # [C] equal captions have equal keys


@dataclass
class BatchPlan(Moves):
    """A batch planned.

    What other kinds of hosts need has its place here, and no code yet: 3-D positions of an image's tokens as a tensor
    beside `Collapsed.row`; the tiles of an image, and the separators between rows of its placeholders, as entries of
    `image_lengths` and of `Collapsed.is_summary`; attention both ways within an image as spans of the compress pass.
    """

    images: int  # M, images that stand in the rows
    distinct_images: int  # U, images that come with the batch
    image_lengths: list[int] | None  # M, placeholders of each as the collator wrote them; None: not known to it
    image_row: Tensor  # [M] the row of each image
    distinct: Tensor | None  # [M] which of the U images that come with the batch each is; None: U = M, in order
    answers: dict[int, AnswerPlan] = field(default_factory=dict)  # by prefix length; empty: no row is labelled
    answer_images: Tensor | None = None  # [M'] the images in rows with a labelled token; None: all
    captions: CaptionPlan | None = None
    labelled_rows: int = 0
    labelled_tokens: int = 0
    order: list[int] | None = None  # `distinct` on the CPU
    # of each rank: distinct images, captions, labelled rows; filled in before the step where there are several ranks
    ranks: list[list[int]] | None = None

    @property
    def counts(self) -> list[int]:
        """Distinct images, captions and labelled rows of this rank."""
        return [self.distinct_images, 0 if self.captions is None else len(self.captions.lengths), self.labelled_rows]

    def of_images(self, rows: Tensor) -> Tensor:
        """[U, …], one for each distinct image → [M, …], one for each image in the rows."""
        return rows if self.distinct is None else rows.index_select(0, self.distinct)

    def list_of_images(self, values: list[int]) -> list[int]:
        """`of_images` for numbers that are on the CPU."""
        return values if self.order is None else [values[i] for i in self.order]

    def answer(self, k: int) -> AnswerPlan:
        """The answer pass with summaries of `k` tokens.

        Raises:
            ValueError: the batch was not planned for it.
        """
        if k not in self.answers:
            raise ValueError(
                f"The batch was planned for summaries of {', '.join(map(str, self.answers))} tokens, and has some of "
                f"{k}: give the collator a planner for them, or leave the plan out."
            )
        return self.answers[k]


@dataclass(frozen=True)
class BatchPlanner:
    """Makes the plan of a batch. It holds numbers alone, so that workers get it with the collator.

    Args:
        image_token_id: the id that stands for an image in `input_ids`.
        lengths: prefix lengths that the batch may be run with; the longest is k.
        contrastive: whether captions are trained on.
    """

    image_token_id: int
    lengths: tuple[int, ...]
    contrastive: bool = True

    def __call__(
        self,
        batch: dict[str, Any],
        images: int,
        image_lengths: Sequence[int] | None = None,
        distinct: Sequence[int] | None = None,
    ) -> BatchPlan:
        """The plan of a batch, on the CPU.

        Args:
            batch: input_ids, attention_mask, labels [B, T], caption_input_ids, caption_attention_mask [B, L]; any may
                be missing.
            images: M, images that stand in the rows.
            image_lengths: placeholders of each, where known.
            distinct: of each, which of the images that come with the batch it is; None: each comes, in order.

        Raises:
            ValueError: images and placeholders do not match, or a caption has no image.
        """
        names = ("input_ids", "attention_mask", "labels", "caption_input_ids", "caption_attention_mask")
        given = {name: batch[name].cpu() for name in names if batch.get(name) is not None}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        lengths = None if image_lengths is None else list(image_lengths)
        image_row = torch.arange(images)
        if ids is not None:
            image_row = collapse(ids, mask, self.image_token_id, images, max(self.lengths), lengths).image_row
        apart = images if distinct is None else len(set(distinct))
        plan = BatchPlan(images, apart, lengths, image_row, None if distinct is None else torch.tensor(distinct))
        plan.order = None if distinct is None else list(distinct)
        if "labels" in given:
            self._plan_answers(plan, given["labels"], ids, mask)
        if self.contrastive and "caption_input_ids" in given:
            rows = images if ids is None else len(ids)
            plan.captions = _captions(plan, given["caption_input_ids"], given.get("caption_attention_mask"), rows)
        return plan

    def _plan_answers(self, plan: BatchPlan, labels: Tensor, ids: Tensor, mask: Tensor | None) -> None:
        counted = labelled_tokens(labels, ids, mask, self.image_token_id)  # [B, T]
        at_rows = counted.any(1).nonzero().flatten()  # rows for the contrastive loss alone need no answer pass
        plan.labelled_rows, plan.labelled_tokens = len(at_rows), int(counted.sum())
        if not len(at_rows):
            return
        lengths, images = plan.image_lengths, plan.images
        if len(at_rows) < len(labels):
            used = counted.any(1)[plan.image_row].nonzero().flatten()  # [M']
            plan.answer_images, images = used, len(used)
            lengths = lengths and [lengths[i] for i in used.tolist()]
            ids, mask = ids[at_rows], None if mask is None else mask[at_rows]
        width = labels.shape[1]
        for k in self.lengths:
            collapsed = collapse(ids, mask, self.image_token_id, images, k, lengths if images else None)
            origin = at_rows[collapsed.row] * width + collapsed.origin % width  # [N] places in the whole batch
            targets = labels.flatten()[origin].masked_fill(collapsed.is_summary, IGNORE)  # [N]
            targets = torch.cat([targets[1:], targets.new_tensor([IGNORE])])
            targets[collapsed.lengths.cumsum(0) - 1] = IGNORE  # the end of a row does not predict the next row
            labelled = (targets != IGNORE).nonzero().flatten()
            plan.answers[k] = AnswerPlan(replace(collapsed, origin=origin), labelled, targets[labelled])


def _captions(plan: BatchPlan, ids: Tensor, mask: Tensor | None, rows: int) -> CaptionPlan | None:
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if len(ids) != rows:
        raise ValueError(f"{len(ids)} captions for {rows} rows: give every row one, or an all-zero mask.")
    at = mask.any(1).nonzero().flatten()  # [C] rows with a caption
    first = torch.full((rows,), plan.images)
    first = first.scatter_reduce(0, plan.image_row, torch.arange(plan.images), "amin")[at]  # [C]
    if bool((first == plan.images).any()):
        raise ValueError(f"Row(s) {at[first == plan.images].tolist()} have a caption, but no image for it.")
    if not len(at):
        return None
    lengths = mask[at].sum(1)
    order = (~mask[at]).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]  # real tokens first
    return CaptionPlan(ids[at].gather(1, order), lengths.tolist(), first, text_keys(ids[at], mask[at]))
