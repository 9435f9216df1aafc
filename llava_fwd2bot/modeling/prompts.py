"""What generate's helpers see of a prompt whose images were collapsed: the caller's own ids, placeholders included.

Logits processors, stopping criteria and streamers are written for the base, whose prompt is longer: n placeholders of
an image, not k. B rows, T tokens of the caller's prompt, L of the collapsed one, N of it and what was generated so far.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList


@dataclass
class Prompt:
    """The caller's prompt."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    collapsed: int  # L

    @property
    def shorter_by(self) -> int:
        return self.ids.shape[1] - self.collapsed

    def restore(self, ids: Tensor) -> Tensor:
        """What generate has, [R, N], with the caller's prompt in front, [R, T + N - L]; R is B times the beams."""
        prompt = self.ids.repeat_interleave(len(ids) // len(self.ids), dim=0).to(ids.device)
        return torch.cat([prompt, ids[:, self.collapsed :]], dim=1)

    def as_in_base(self, config: Any) -> Any:
        """Generation settings whose lengths, which count the collapsed prompt, count this one."""
        config = copy.copy(config)
        for name in ("max_length", "min_length"):
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name) + self.shorter_by)
        return config


class SeesPrompt:
    """A logits processor or a stopping criterion, which is called with the caller's prompt in front."""

    def __init__(self, function: Any, prompt: Prompt) -> None:
        self.function, self.prompt = function, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # two arguments: generate looks at the signature
        return self.function(self.prompt.restore(input_ids), scores)


class PromptProcessors(LogitsProcessorList):
    """The caller's logits processors on their way to where generate makes its own."""

    def __init__(self, given: Iterable[Any] | None, prompt: Prompt) -> None:
        super().__init__(given or [])
        self.prompt = prompt


class PromptCriteria(StoppingCriteriaList):
    """The caller's stopping criteria on their way to where generate makes its own."""

    def __init__(self, given: Iterable[Any] | None, prompt: Prompt) -> None:
        super().__init__(given or [])
        self.prompt = prompt


class PromptStreamer:
    """A streamer between generate and the user's: the first ids it gets are the prompt, which must be the caller's."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt, None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
