"""The losses and figures of training steps, summed up until they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METRICS = ("answer_loss", "contrastive_loss", "distill_loss", "temperature", "retrieval_accuracy")
_OF_TOKENS = ("answer_loss", "distill_loss")  # means over labelled tokens


class StepMetrics:
    """Means of METRICS since the last log: over labelled tokens of a step, or over its micro-batches.

    Sums stay on the device, so that no step waits for them.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [2 · metrics]: value and weight of each

    def add(self, outputs: Any, step: tuple[Tensor, int] | None) -> None:
        """Adds the `Fwd2BotOutput` of one micro-batch.

        Args:
            step: labelled tokens and micro-batches of its optimizer step, where they are known.
        """
        share = 1.0
        if step is not None and outputs.answer_tokens is not None:
            share = outputs.answer_tokens * step[1] / step[0]
        zero = torch.zeros((), device=outputs.loss.device)
        sums = []
        for name in METRICS:
            value = getattr(outputs, name, None)
            if value is None:
                sums += [zero, zero]
                continue
            value = value.detach().float()
            weight = zero + (share if name in _OF_TOKENS else 1.0)
            if name == "retrieval_accuracy":  # NaN where a batch has no pair
                value, weight = value.nan_to_num(), weight * ~value.isnan()
            sums += [value * weight, weight]
        total = torch.stack(sums)
        self._sums = total if self._sums is None else self._sums + total

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all ranks, of what was added on each; starts anew."""
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, reduction="sum").view(-1, 2).tolist()
        self._sums = None
        return {name: round(total / count, 4) for name, (total, count) in zip(METRICS, sums, strict=True) if count}
