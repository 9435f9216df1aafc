"""`ask_many`: many questions about one image, which is compressed once, or not at all.

    found = ask_many(model, processor, "beach.jpg", ["What is this?", "Is it day?"])
    found.answers, found.saved_tokens
    for number, piece in ask_many(model, processor, summary, questions, stream=True): …   # as they are generated

Shapes: Q questions, n dense tokens, k summary tokens, D hidden size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from ..config import check_k
from ..files.images import open_image
from ..files.pixels import OWN
from .answer import BATCH, ImageLike
from .batched import Answer, run
from .conversation import ConversationFormatter, prompt_ids
from .images import join_pixels, prepare_pixels


@dataclass
class ManyAnswers:
    """The answers to many questions about one image, in the order of the questions.

    Attributes:
        k: summary tokens that were read for each question.
        read_tokens: what the language model read: all prompts, and the compress pass where there was one.
        base_tokens: what the base would have read; None where the image's dense tokens are not known, as those of a
            summary alone are not.
    """

    answers: list[str]
    k: int
    read_tokens: int
    base_tokens: int | None

    @property
    def saved_tokens(self) -> int | None:
        """Tokens that need not be read; less than none where one question does not pay for the compress pass."""
        return None if self.base_tokens is None else self.base_tokens - self.read_tokens


@overload
def ask_many(
    model: Any,
    processor: Any,
    context: ImageLike | Tensor,
    questions: Sequence[str],
    *,
    cache: Any = None,
    k: int | None = None,
    stream: Literal[False] = False,
    batch_size: int = BATCH,
    **options: Any,
) -> ManyAnswers: ...
@overload
def ask_many(
    model: Any,
    processor: Any,
    context: ImageLike | Tensor,
    questions: Sequence[str],
    *,
    cache: Any = None,
    k: int | None = None,
    stream: Literal[True],
    batch_size: int = BATCH,
    **options: Any,
) -> Iterator[tuple[int, str]]: ...
def ask_many(
    model: Any,
    processor: Any,
    context: ImageLike | Tensor,
    questions: Sequence[str],
    *,
    cache: Any = None,
    k: int | None = None,
    stream: bool = False,
    batch_size: int = BATCH,
    **options: Any,
) -> ManyAnswers | Iterator[tuple[int, str]]:
    """Answers many questions about one image, in batches.

    Args:
        model, processor: of `load_fwd2bot`.
        context: a file or a PIL image, which is compressed once; a summary [k, D]; or, with `cache`, an id in it.
        questions: plain texts, without the chat template.
        cache: a `SummaryCache` that holds `context`.
        k: answer from the first k summary tokens; default: all.
        stream: give an iterator over (number of the question, piece of its answer), as they are generated.
        batch_size: questions answered at once.
        options: max_new_tokens (128), temperature (0: greedy), top_p, seed, stop: as of `processing.batched.Answer`.

    Raises:
        ValueError: no question, or an empty one; k out of range; an image that cannot be read; an id that is not there.
    """
    if isinstance(questions, str) or not len(questions):
        raise ValueError("questions is a list of at least one text.")
    if empty := [i for i, question in enumerate(questions) if not question.strip()]:
        raise ValueError(f"question {empty[0]} is empty.")
    check_k(model.fwd2bot_config, k)
    summary, dense, compressed = _context(model, processor, context, cache, k)
    formatter = ConversationFormatter(processor)
    rows = [
        Answer(prompt_ids(processor, formatter.prompt(text))["input_ids"][0], [summary], processor.tokenizer, **options)
        for text in questions
    ]
    if stream:
        return _streamed(model, rows, batch_size)
    for at in range(0, len(rows), batch_size):
        run(model, rows[at : at + batch_size])
    words = sum(len(answer.ids) - 1 for answer in rows)
    read = words + len(rows) * len(summary) + compressed
    base = None if dense is None else words + len(rows) * dense
    return ManyAnswers([answer.text for answer in rows], len(summary), read, base)


@torch.inference_mode()
def _context(model: Any, processor: Any, context: Any, cache: Any, k: int | None) -> tuple[Tensor, int | None, int]:
    """The summary [k, D]; n, where it is known; tokens of the compress pass, 0 where there was none."""
    if cache is not None:
        if not isinstance(context, str):
            raise ValueError(f"With a cache, context is an id in it, not {type(context).__name__}.")
        row = cache.named([context])[0]
        return cache.get([context], k)[0], _dense_length(processor, row["width"], row["height"]), 0
    if isinstance(context, Tensor):
        size = model.get_input_embeddings().weight.shape[1]
        if context.dim() != 2 or context.shape[1] != size or not len(context):
            raise ValueError(f"A summary is [k, {size}], not {list(context.shape)}.")
        if k is not None and k > len(context):
            raise ValueError(f"The summary holds {len(context)} tokens, but k = {k}.")
        return context[:k], None, 0
    image = context.convert("RGB") if isinstance(context, Image.Image) else open_image(context, reading=OWN)
    pixels = join_pixels([prepare_pixels(processor, model, [image])], model.get_input_embeddings().weight)
    summaries, lengths = model._compress_images(pixels, k)
    summary = summaries[0]
    return summary, lengths[0], lengths[0] + len(model.fwd2bot.image_prompt_ids) + len(summary)


def _dense_length(processor: Any, width: int, height: int) -> int | None:
    """n of an image of this size, by the processor; the original LLaVA's writes one token for any."""
    if hasattr(processor, "tokenize") or not (width and height):
        return None
    token = processor.image_token
    ids = processor(text=token, images=Image.new("RGB", (width, height)), return_tensors="pt")["input_ids"]
    return int((ids == processor.tokenizer.convert_tokens_to_ids(token)).sum()) or None


def _streamed(model: Any, rows: Sequence[Answer], batch_size: int) -> Iterator[tuple[int, str]]:
    """The pieces of all answers; the model runs in a thread, whose error is raised here."""
    pieces: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    for number, answer in enumerate(rows):
        answer.emit = lambda text, number=number: pieces.put((number, text))
        answer.cancelled = stop.is_set

    def work() -> None:
        try:
            for at in range(0, len(rows), batch_size):
                if not stop.is_set():
                    run(model, rows[at : at + batch_size])
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (found := pieces.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        thread.join()
