"""An answer in pieces, as it is generated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class _Stop(StoppingCriteria):
    """Ends the generation of an iterator that nobody reads any more."""

    def __init__(self) -> None:
        self.requested = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.requested.is_set(), device=input_ids.device)


def streamed(
    generate: Callable[[dict[str, Any]], list[str]],
    processor: Any,
    options: dict[str, Any],
    done: Callable[[list[str]], None],
) -> Iterator[str]:
    """The pieces of one answer, as they are generated.

    Args:
        generate: called with `options` and a streamer, in a thread of its own; its error is raised here.
        done: called with the whole answers.
    """
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = _Stop()
    criteria = StoppingCriteriaList([stop, *(options.pop("stopping_criteria", None) or [])])
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done(generate({**options, "streamer": streamer, "stopping_criteria": criteria}))
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.requested.set()
        thread.join()
    if failed:
        raise failed[0]
