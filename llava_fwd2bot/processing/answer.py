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
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..files.images import open_image
from ..files.pixels import OWN
from .conversation import PLACEHOLDER, ConversationFormatter
from .generate import from_base, from_summaries, summaries_of

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
        counts, rows = _image_rows(questions, images, single)
    elif summary is not None:
        counts, rows = _summary_rows(model, questions, summary, single, k)
    else:
        counts, rows = [0] * len(questions), [None] * len(questions)
    prompts = [
        _prompt(formatter, questions[i], count, "the question" if single else f"question {i}")
        for i, count in enumerate(counts)
    ]
    options = {"max_new_tokens": max_new_tokens, **options}
    if stream:

        def generate(options: dict[str, Any]) -> list[str]:
            return _batch(model, processor, prompts, rows, base, k, options)

        return _streamed(generate, processor, questions, options)
    answers: list[str] = []
    for at in range(0, len(prompts), batch_size):
        part = slice(at, at + batch_size)
        answers += _batch(model, processor, prompts[part], rows[part], base, k, options)
    _warn_of_empty(answers, questions)
    return answers[0] if single else answers


def untrained_k(config: Any, k: int | None) -> str | None:
    """What to warn of where the model was not trained with k summary tokens, else None."""
    trained = config.nested_k or [config.num_summary_tokens]
    if k is None or k in trained or k == config.num_summary_tokens:
        return None
    return f"k = {k} was not trained: this model was trained with k = {', '.join(map(str, sorted(trained)))}."


def _by_base(model: nn.Module, base: bool, summary: Any, k: int | None) -> bool:
    """Whether the base answers; ValueError where it is given what only Fwd2Bot reads."""
    has = hasattr(model, "fwd2bot")
    if base or not has:
        given = "summary" if summary is not None else "k" if k is not None else None
        if given:
            who = "base=True answers from dense tokens" if has else "This model has no Fwd2Bot"
            raise ValueError(f"{who}: leave out {given}.")
        return True
    most = model.fwd2bot_config.num_summary_tokens
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to this model's k = {most}, got {k}.")
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


# ---------------------------------------------------------------------- what belongs to each question
def _image_rows(questions: Sequence[str], images: Any, single: bool) -> tuple[list[int], list[list[Any]]]:
    """How many images belong to each question, and the images."""
    several = isinstance(images, (list, tuple))
    if single:
        rows = [_listed(images)]
    elif not several:
        rows = [[images]] * len(questions)
    else:
        rows = [_listed(row) for row in images]
        if len(rows) != len(questions):
            raise ValueError(
                f"There are {len(questions)} questions and {len(rows)} images: give one image, or one list of images, "
                "for each question, or a single image for all of them."
            )
    opened: dict[Any, Image.Image] = {}
    for image in (image for row in rows for image in row):
        key = id(image) if isinstance(image, Image.Image) else image
        if key not in opened:
            opened[key] = _opened(image)
    rows = [[opened[id(i) if isinstance(i, Image.Image) else i] for i in row] for row in rows]
    return [len(row) for row in rows], rows


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]


def _opened(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, os.PathLike)):
        return open_image(image, reading=OWN)  # as `ask` and `compress` read people's own photographs
    raise ValueError(f"An image is the path of a file or a PIL image, got {type(image).__name__}.")


def _summary_rows(
    model: nn.Module, questions: Sequence[str], summary: Any, single: bool, k: int | None
) -> tuple[list[int], list[Tensor]]:
    """How many images belong to each question, and their summaries [M, k, D]."""
    if isinstance(summary, Tensor):
        if summary.dim() == 2:
            rows = [summary[None]] * len(questions)
        elif single or summary.dim() != 3:
            rows = [summary]
        else:
            rows = [one[None] for one in summary]
    elif single:
        rows = [torch.stack(list(summary))]
    else:
        rows = [one[None] if one.dim() == 2 else one for one in summary]
    if len(rows) != len(questions):
        raise ValueError(
            f"There are {len(questions)} questions and {len(rows)} summaries: give one summary for each question, as "
            f"[{len(questions)}, k, D] or a list, or a single one, as [k, D], for all of them."
        )
    size = model.get_input_embeddings().weight.shape[1]
    for row in rows:
        if row.dim() != 3 or row.shape[-1] != size:
            raise ValueError(f"A summary is [k, {size}], or [images, k, {size}], not {list(row.shape)}.")
        if k is not None and k > row.shape[1]:
            raise ValueError(f"The summaries hold {row.shape[1]} tokens per image, but k = {k}.")
    return [len(row) for row in rows], [row[:, :k] for row in rows]


# ---------------------------------------------------------------------- the model
def _batch(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[str],
    rows: Sequence[Any],
    base: bool,
    k: int | None,
    options: dict[str, Any],
) -> list[str]:
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


class _Stop(StoppingCriteria):
    """Ends the generation of an iterator that nobody reads any more."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def _streamed(
    generate: Callable[[dict[str, Any]], list[str]], processor: Any, questions: Sequence[str], options: dict[str, Any]
) -> Iterator[str]:
    """The pieces of one answer: `generate` runs in a thread, whose error is raised here."""
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = _Stop()
    criteria = StoppingCriteriaList([stop, *(options.pop("stopping_criteria", None) or [])])
    failed: list[BaseException] = []

    def run() -> None:
        try:
            answers = generate({**options, "streamer": streamer, "stopping_criteria": criteria})
            _warn_of_empty(answers, questions, stacklevel=2)
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.asked.set()
        thread.join()
    if failed:
        raise failed[0]
