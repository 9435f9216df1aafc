"""Weights or gradients that are split over ranks (FSDP, DeepSpeed's ZeRO), and what their ranks must do alike.

With FSDP and ZeRO-3 a layer's weights are gathered from all ranks for each call, forward and backward. ZeRO-1 and 2 put
gradients together in the order in which backward makes them. So every rank must run the same calls in a step, whatever
its rows hold: one without an image, a caption or a label runs a small pass in its place, whose result counts zero.

ZeRO-3 does not clear its parts of the gradients after a step. A weight that gets no gradient on any rank is updated
with that of an earlier step once more. So what an earlier step had runs in every later one, on a single process too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint.gathering import is_zero3
from .plan import CaptionPlan


@dataclass
class Fullest:
    """What the fullest rank of a step has, part by part; every rank runs the calls for that many."""

    images: int
    captions: int
    labelled_rows: int
    idle: list[Tensor] = field(default_factory=list)  # results that count zero, one number each

    @classmethod
    def of(cls, images: int, captions: int, labelled_rows: int, device: torch.device) -> Fullest:
        """From this rank's own numbers. Every rank must call it."""
        counts = torch.tensor([images, captions, labelled_rows], device=device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return cls(*counts.tolist())

    def run_idle(self, result: Tensor) -> None:
        """Takes the result of a call that was made for the other ranks' sake."""
        self.idle.append(0 * result.sum())


def is_sharded(module: nn.Module) -> bool:
    """Whether weights or gradients of the module are split over ranks: a call of it is then a call on all of them."""
    # `_hp_mapping` is what ZeRO-1 and 2 leave at each parameter that trains
    if any(isinstance(p, DTensor) or is_zero3(p) or hasattr(p, "_hp_mapping") for p in module.parameters()):
        return True
    return any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules())


def touched(parameters: Iterator[nn.Parameter]) -> Tensor | float:
    """Zero, to which each parameter contributes: DistributedDataParallel waits for every gradient.

    Weights that are in parts just now are left out: their layers' calls are the same on all ranks.
    """
    here = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor) and p.numel()]
    return sum(0 * p.flatten()[0] for p in here)


class Fwd2BotRanksMixin:
    """The calls that a rank makes for the others' sake, or for ZeRO-3's, in a training forward."""

    _fullest: Fullest | None = None  # within a training forward whose weights are split over ranks
    _past: Sequence[int] = (0, 0, 0)  # ZeRO-3: 1 for what an earlier forward had: images, captions, labelled rows

    def _calls(self, batch: Any, together: bool) -> Fullest | None:
        """What this forward makes its calls for, if not for this rank's rows alone.

        Args:
            together: whether the ranks must run the same calls. Every rank then comes here first.
        """
        keeps = self.training and is_zero3(self.fwd2bot.tokens)
        if not together and not keeps:
            return None
        fullest = self._agree(batch) if together else Fullest(*self._parts(batch))
        if keeps:
            parts = [fullest.images, fullest.captions, fullest.labelled_rows]
            fullest = Fullest(*map(max, parts, self._past))
            self._past = [max(past, min(1, part)) for past, part in zip(self._past, parts, strict=True)]
        return fullest

    def _agree(self, batch: Any) -> Fullest:
        """What the fullest rank has. Every rank comes here first."""
        if self.fwd2bot_config.distill_weight > 0:
            raise ValueError(
                "distill_weight is not supported where the language model's weights are split over ranks (FSDP, "
                "ZeRO-3): its teacher's calls differ from rank to rank. Set it to 0, or use DDP or ZeRO-2."
            )
        if batch.plan is not None and batch.plan.ranks is not None:  # told before the step
            return Fullest(*(max(counts) for counts in zip(*batch.plan.ranks, strict=True)))
        return Fullest.of(*self._parts(batch), self.fwd2bot.tokens.device)

    def _parts(self, batch: Any) -> list[int]:
        """How many images, captions and labelled rows this rank's batch has."""
        if batch.plan is not None:
            return batch.plan.counts
        images = self._count_images(batch.image_inputs)
        captions = labelled = 0
        if batch.caption_input_ids is not None and self.fwd2bot_config.contrastive_weight > 0:
            mask = batch.caption_attention_mask
            captions = int((torch.ones_like(batch.caption_input_ids) if mask is None else mask).any(1).sum())
        if batch.labels is not None:
            labelled = int(self.labelled_tokens(batch.labels, batch.input_ids, batch.attention_mask).any(1).sum())
        return [images, captions, labelled]

    def _idle_image(self, num_tokens: int | None) -> Tensor:
        """The calls that an image takes: vision tower, projector, compress pass."""
        return self._compress_images(self._blank_image(), num_tokens)[0]

    def _idle_text(self, num_tokens: int | None) -> Tensor:
        none = torch.zeros(1, dtype=torch.long, device=self.fwd2bot.tokens.device)
        return self._embed_captions(CaptionPlan(none[:, None], [1], none, none), num_tokens)

    def _idle_bridge(self) -> None:
        """The bridge's call in an answer pass that no summary takes part in."""
        if self._fullest is not None:
            self._fullest.run_idle(self.fwd2bot.bridge(self.fwd2bot.tokens[:1]))

    def _idle_answer(self) -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.fwd2bot.tokens.device)
        rows = self.get_input_embeddings()(ids)  # [1, 1, D]
        self._idle_bridge()
        rows = rows if rows.requires_grad else rows.detach().requires_grad_()
        hidden = self._language_model()(inputs_embeds=rows, use_cache=False).last_hidden_state
        return self.get_output_embeddings()(hidden)
