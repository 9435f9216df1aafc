"""Accumulation in the trainer of transformers before 4.46, which the original LLaVA pins.

That trainer takes one micro-batch after another, and knows nothing of the others of an optimizer step. The answer loss
is a mean over the labelled tokens of the whole step, so its data loader collects the step's micro-batches first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer
from transformers import Trainer

from ..hosts.original import shims


def needed() -> bool:
    """Whether this transformers' trainer takes the micro-batches of a step one by one."""
    return not hasattr(Trainer, "get_batch_samples")


def look_ahead(loader: Any, steps: int, see: Callable[..., None]) -> Any:
    """Makes the data loader collect `steps` micro-batches, and show them to `see` before it gives the first of them.

    At the end of an epoch there may be fewer. The trainer carries them over into the next epoch's first step, so they
    count as their part of a step; an epoch of fewer than `steps` in all ends with a step of its own.
    """
    if hasattr(loader, "look_ahead"):
        return loader
    whole = min(steps, len(loader))

    class LookingAhead(type(loader)):
        def __iter__(self) -> Iterator[Any]:
            group: list[Any] = []
            for batch in super().__iter__():
                group.append(batch)
                if len(group) == steps:
                    see(group)
                    yield from group
                    group = []
            if group:
                see(group, micro_batches=whole)
                yield from group

    loader.__class__ = LookingAhead  # the trainer, and accelerate, ask what kind of loader it is
    loader.look_ahead = lambda other: look_ahead(other, steps, see)
    return loader


@contextmanager
def resumable() -> Iterator[None]:
    """Within it a run that is resumed within an epoch looks ahead too: accelerate makes a new loader for the rest."""
    if not needed():
        yield
        return
    stock = transformers.trainer.skip_first_batches

    def skip_first_batches(loader: Any, count: int = 0) -> Any:
        rest = stock(loader, count)
        return loader.look_ahead(rest) if hasattr(loader, "look_ahead") else rest

    with shims.rebound(transformers.trainer, skip_first_batches=skip_first_batches):
        yield
