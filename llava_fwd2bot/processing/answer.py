"""`answer`: questions about images, or about stored summaries, in one call.

    model, processor = load_fwd2bot("smol-llava")
    answer(model, processor, "What is in the picture?", "beach.jpg")                      # a string
    answer(model, processor, ["What is this?", "How many?"], ["a.jpg", "b.jpg"])          # a list of strings
    for piece in answer(model, processor, "Describe it.", "beach.jpg", stream=True): …    # as it is generated
    answer(model, processor, "What is this?", summary=model.compress(**pixels))           # without the vision tower

Shapes: M images, k summary tokens, D hidden size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor, nn

from ..config import check_k
from .conversation import PLACEHOLDER, ConversationFormatter
from .generate import from_base, from_summaries, summaries_of
from .rows import image_rows, summary_rows
from .stream import streamed

ImageLike = str | os.PathLike | Image.Image
BATCH = 8  # questions answered at once


@overload
def answer(
    model: nn.Module,
    processor: Any,
    question: str,
    images: ImageLike | Sequence[ImageLike] | None = None,
    *,
    summary: Tensor | Sequence[Tensor] | None = None,
    k: int | None = None,
    base: bool = False,
    max_new_tokens: int = 128,
    stream: Literal[False] = False,
    batch_size: int = BATCH,
    **options: Any,
) -> str: ...
@overload
def answer(
    model: nn.Module,
    processor: Any,
    question: str,
    images: ImageLike | Sequence[ImageLike] | None = None,
    *,
    summary: Tensor | Sequence[Tensor] | None = None,
    k: int | None = None,
    base: bool = False,
    max_new_tokens: int = 128,
    stream: Literal[True],
    **options: Any,
) -> Iterator[str]: ...
@overload
def answer(
    model: nn.Module,
    processor: Any,
    question: Sequence[str],
    images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]] | None = None,
    *,
    summary: Tensor | Sequence[Tensor] | None = None,
    k: int | None = None,
    base: bool = False,
    max_new_tokens: int = 128,
    stream: Literal[False] = False,
    batch_size: int = BATCH,
    **options: Any,
) -> list[str]: ...
def answer(
    model: nn.Module,
    processor: Any,
    question: str | Sequence[str],
    images: Any = None,
    *,
    summary: Tensor | Sequence[Tensor] | None = None,
    k: int | None = None,
    base: bool = False,
    max_new_tokens: int = 128,
    stream: bool = False,
    batch_size: int = BATCH,
    **options: Any,
) -> str | list[str] | Iterator[str]:
    """Answers questions; the prompt is made by the processor's chat template.

    Args:
        model, processor: of `load_fwd2bot`. Also a LLaVA without Fwd2Bot, which answers from its dense tokens.
        question: plain text, without the chat template; `<image>` in it says where an image stands. A list of
            questions is answered in batches.
        images: files or PIL images; files are turned by their EXIF orientation, and put on white where they are
            transparent. For one question: its image, or a list of its images. For a list of questions: a
            list with the image, or the list of images, of each; or one image for all of them.
        summary: stored summaries instead of images. For one question: [k, D], or [M, k, D] of its M images. For a list
            of questions: [questions, k, D], or a list with the [k, D] or [M, k, D] of each; or one [k, D] for all.
        k: answer from the first k summary tokens; default: all.
        base: answer by the base, from all dense tokens, in the place of Fwd2Bot.
        max_new_tokens: of an answer.
        stream: give an iterator over the pieces of the answer to one question, as they are generated.
        batch_size: questions answered at once.
        options: of `generate`: do_sample, temperature, a `streamer` of transformers for one question, …

    Returns:
        The answer; a list for a list of questions, in their order; an iterator with `stream`.

    Raises:
        ValueError: an empty question; images and summaries at once, or not as many as questions; `<image>` not once for
            each image; k out of range; an image that cannot be read; summaries or k where the base answers.

    Warns:
        UserWarning: an answer is empty; or k is a number of tokens that the model was not trained with.
    """
    single = isinstance(question, str)
    questions = [question] if single else list(question)
    if not questions:
        raise ValueError("There is no question: the list is empty.")
    if images is not None and summary is not None:
        raise ValueError("Give either images or summary, not both.")
    if stream and not single:
        raise ValueError("stream=True takes one question: call answer() once for each, or leave out stream.")
    base = _by_base(model, base, summary, k)
    formatter = ConversationFormatter(processor)
    if images is not None:
        counts, rows = image_rows(questions, images, single)
    elif summary is not None:
        counts, rows = summary_rows(model, questions, summary, single, k)
    else:
        counts, rows = [0] * len(questions), [None] * len(questions)
    prompts = [
        _prompt(formatter, questions[i], count, "the question" if single else f"question {i}")
        for i, count in enumerate(counts)
    ]
    options = {"max_new_tokens": max_new_tokens, **options}
    if stream:

        def generate(options: dict[str, Any]) -> list[str]:
            return answers_to(model, processor, prompts, rows, base, k, options)

        return streamed(generate, processor, options, lambda answers: _warn_of_empty(answers, questions, stacklevel=2))
    answers: list[str] = []
    for at in range(0, len(prompts), batch_size):
        part = slice(at, at + batch_size)
        answers += answers_to(model, processor, prompts[part], rows[part], base, k, options)
    _warn_of_empty(answers, questions)
    return answers[0] if single else answers


def untrained_k(config: Any, k: int | None) -> str | None:
    """What to warn of where the model was not trained with k summary tokens, else None."""
    trained = config.nested_k or [config.num_summary_tokens]
    if k is None or k in trained or k == config.num_summary_tokens:
        return None
    return f"k = {k} was not trained: this model was trained with k = {', '.join(map(str, sorted(trained)))}."


def _by_base(model: Any, base: bool, summary: Any, k: int | None) -> bool:
    """Whether the base answers; ValueError where it is given what only Fwd2Bot reads."""
    has = hasattr(model, "fwd2bot")
    if base or not has:
        given = "summary" if summary is not None else "k" if k is not None else None
        if given:
            who = "base=True answers from dense tokens" if has else "This model has no Fwd2Bot"
            raise ValueError(f"{who}: leave out {given}.")
        return True
    check_k(model.fwd2bot_config, k)
    if warning := untrained_k(model.fwd2bot_config, k):
        warnings.warn(warning, stacklevel=3)
    return False


def _prompt(formatter: ConversationFormatter, question: str, images: int, name: str) -> str:
    """The prompt of one question, which errors call `name`."""
    if not isinstance(question, str):
        raise ValueError(f"{name} must be a text, got {type(question).__name__}.")
    if not question.replace(PLACEHOLDER, "").strip():
        raise ValueError(f"{name} is empty.")
    ending = formatter.prompt("?", 0).rpartition("?")[2].strip()  # what asks for the answer, such as "ASSISTANT:"
    if ending and question.rstrip().endswith(ending):
        raise ValueError(f"{name} ends with {ending!r}: give it without the chat template, which is added.")
    if question.count(PLACEHOLDER) not in (0, images):
        raise ValueError(
            f"{name} holds {question.count(PLACEHOLDER)} {PLACEHOLDER}, and {images} image(s) belong to it: "
            f"write {PLACEHOLDER} once for each image, or leave it out."
        )
    return formatter.prompt(question, images)


# ---------------------------------------------------------------------- the model
def answers_to(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    rows: Sequence[Any],
    base: bool,
    k: int | None,
    options: dict[str, Any],
) -> list[str]:
    """One text for each prompt, all in one batch; the base takes them one by one.

    Args:
        prompts: with one image token for each image.
        rows: of each prompt, a list of its PIL images, its summaries [m, k, D], or None.
    """
    if base:
        return [
            from_base(model, processor, prompt, row or [], **options)[0]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    if all(isinstance(row, Tensor) for row in rows):
        summary = _joined(rows)
    else:
        images = [image for row in rows for image in row or []]
        distinct = list({id(image): image for image in images}.values())  # one that several ask about: compressed once
        place = {id(image): i for i, image in enumerate(distinct)}
        made = summaries_of(model, processor, distinct, k) if distinct else None
        summary = None if made is None else made[[place[id(image)] for image in images]]
    return from_summaries(model, processor, prompts, summary, **options)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """[M, k, D] of all rows."""
    lengths = {row.shape[1] for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"The summaries hold {sorted(lengths)} tokens: give k, of which each has enough.")
    return torch.cat(list(rows))


def _warn_of_empty(answers: Sequence[str], questions: Sequence[str], stacklevel: int = 3) -> None:
    empty = [question for text, question in zip(answers, questions, strict=True) if not text]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(answers)} answer(s) are empty, the first to {empty[0]!r}: the model ended at once, "
            "or said nothing but special tokens.",
            stacklevel=stacklevel,
        )
