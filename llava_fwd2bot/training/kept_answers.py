"""Kept answers: to how many questions of a sample Fwd2Bot gives the base's answer, at each evaluation of a training.

The base answers once, from all dense tokens; its answers are kept beside the checkpoints, for a run that is resumed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from ..files.regular import file_digest
from ..files.text import read_json
from ..files.writing import write_json
from ..processing.answer import answers_to
from ..processing.conversation import PLACEHOLDER
from ..processing.images import ImageError, processor_digest
from ..processing.normal import normal

if TYPE_CHECKING:
    from .data import LlavaDataset

_COUNTS = ("asked", "kept", "short", "right", "base_right")


@dataclass(frozen=True)
class Question:
    """The first question of a record: its images in order, its prompt, and the answer that the data give."""

    record: str
    images: tuple[str, ...]
    prompt: str
    answer: str


def rows_with_questions(dataset: LlavaDataset) -> list[int]:
    """The rows whose first question shows an image.

    Raises:
        ValueError: there is none.
    """
    rows = [int(i) for i in np.flatnonzero((dataset.rows.images > 0) & (dataset.rows.words > 0))]
    rows = [i for i in rows if PLACEHOLDER in dataset.rows[i].turns[0]["value"]]
    if not rows:
        raise ValueError(
            "--eval_kept_answers asks questions about images, and no record of the evaluation data has an image in its "
            "first question: name such records by --eval_data_path, or leave --eval_kept_answers out."
        )
    return rows


def sample(dataset: LlavaDataset, count: int) -> list[Question]:
    """`count` questions, evenly over the rows that ask one about an image; all of them where there are fewer.

    They depend on the data alone, so that each run and each rank takes the same. Of a conversation it is the first
    question: later ones can be about answers that a model has not given.
    """
    rows = rows_with_questions(dataset)
    count = min(count, len(rows))
    questions = []
    for at in range(count):
        row = dataset.rows[rows[at * len(rows) // count]]
        asked, answer = row.turns[0], row.turns[1]["value"]
        images = tuple(row.images[: asked["value"].count(PLACEHOLDER)])
        questions.append(Question(row.name, images, dataset.formatter.ask([asked]), answer))
    return questions


class KeptAnswers:
    """The sample of one data set, and the base's answers to it once they are known.

    Args:
        dataset: the evaluation data. count: how many questions; all, with a warning, where it has fewer.
        max_new_tokens: of an answer, the base's and Fwd2Bot's.

    Raises:
        ValueError: the data have no question about an image.
    """

    def __init__(self, dataset: LlavaDataset, count: int, max_new_tokens: int, processor: Any) -> None:
        self.dataset, self.max_new_tokens, self.processor = dataset, max_new_tokens, processor
        self.questions = sample(dataset, count)
        self._base: list[str | None] | None = None

    def warn_of_fewer(self, count: int) -> None:
        if len(self.questions) < count:
            warnings.warn(
                f"--eval_kept_answers {count}: the evaluation data have {len(self.questions)} record(s) whose first "
                "question shows an image, and all of them are asked.",
                stacklevel=2,
            )

    def measure(
        self, model: Any, accelerator: Any, folder: Path, batch: int, precision: Callable[[], AbstractContextManager]
    ) -> dict[str, float]:
        """The metrics of this evaluation. Every rank must call it; each answers its share.

        Args:
            model: with Fwd2Bot on it, in no part of it split over ranks.
            folder: where the base's answers are kept. batch: questions answered at once.
            precision: the context in which the model computes.

        Returns:
            kept_answers, the share of questions whose normalised answer is the base's; and where some answer of the
            data fits into `max_new_tokens`, answers_right and base_answers_right, the shares of these that Fwd2Bot and
            the base answer as the data do.

        Raises:
            ImageError: an image cannot be used; with `on_bad_image="skip"` its question is left out.
            ValueError: no question is left.
        """
        own = range(accelerator.process_index, len(self.questions), accelerator.num_processes)
        was_training = model.training
        model.eval()
        try:
            with precision():
                base = self._base_answers(model, accelerator, folder, own, batch)
                found = self._answers(model, own, batch, base=False)
        finally:
            model.train(was_training)
        counts = torch.zeros(len(_COUNTS), dtype=torch.long, device=accelerator.device)
        for at, text in zip(own, found, strict=True):
            if text is not None and base[at] is not None:
                counts += torch.tensor(self._score(self.questions[at], text, base[at]), device=counts.device)
        total = dict(zip(_COUNTS, accelerator.reduce(counts, reduction="sum").tolist(), strict=True))
        if not total["asked"]:
            raise ValueError(
                f"--eval_kept_answers: none of the {len(self.questions)} questions could be asked, as their images "
                "cannot be used. Give other evaluation data, or leave it out."
            )
        metrics = {"kept_answers": total["kept"] / total["asked"]}
        if total["short"]:
            metrics["answers_right"] = total["right"] / total["short"]
            metrics["base_answers_right"] = total["base_right"] / total["short"]
        return metrics

    def _score(self, question: Question, text: str, base: str) -> list[bool]:
        """What one question adds to _COUNTS; an answer of the data that is too long for `max_new_tokens` is no test."""
        ids = self.dataset.tokenizer(question.answer, add_special_tokens=False, verbose=False)["input_ids"]
        short, wanted = len(ids) <= self.max_new_tokens, normal(question.answer)
        right = [short and normal(answer) == wanted for answer in (text, base)]
        return [True, normal(text) == normal(base), short, *right]

    def _answers(self, model: Any, own: Sequence[int], batch: int, base: bool) -> list[str | None]:
        """Greedy answers to the questions `own`; None for one whose image cannot be used, where those are skipped."""
        options = {"max_new_tokens": self.max_new_tokens, "use_cache": True}
        found: dict[int, str] = {}
        for start in range(0, len(own), batch):
            opened: dict[str, Image.Image] = {}  # one that several ask about is compressed once
            part = [at for at in own[start : start + batch] if self._open(self.questions[at], opened)]
            prompts = [self.questions[at].prompt for at in part]
            rows = [[opened[name] for name in self.questions[at].images] for at in part]
            if part:
                texts = answers_to(model, self.processor, prompts, rows, base, None, options)
                found.update(zip(part, texts, strict=True))
        return [found.get(at) for at in own]

    def _open(self, question: Question, opened: dict[str, Image.Image]) -> bool:
        """Puts the question's images into `opened`; False where one cannot be used and may be skipped."""
        for name in question.images:
            if name in opened:
                continue
            try:
                opened[name] = self.dataset.reader.open(name)
            except ImageError as error:
                if self.dataset.on_bad_image != "skip":
                    raise ImageError(f"{question.record}: {error}") from error
                self.dataset.bad_images.skip(name, f"{question.record}: {error}")
                return False
        return True

    # ------------------------------------------------------------------ the base's
    def _base_answers(
        self, model: Any, accelerator: Any, folder: Path, own: Sequence[int], batch: int
    ) -> list[str | None]:
        """The base's answers to all questions: from an earlier evaluation, an earlier run, or now."""
        if self._base is not None:
            return self._base
        key = self._fingerprint(model, accelerator) if accelerator.is_main_process else ""
        path = folder / f"base_answers_{key[:12]}.json"
        shared = [_read(path, key, len(self.questions)) if accelerator.is_main_process else None]
        if accelerator.num_processes > 1:  # a disk need not be shared
            broadcast_object_list(shared)
        if shared[0] is None:
            parts = list(zip(own, self._answers(model, own, batch, base=True), strict=True))
            answers = dict(gather_object(parts) if accelerator.num_processes > 1 else parts)
            shared[0] = [answers[at] for at in range(len(self.questions))]
            if accelerator.is_main_process:
                self._write(path, key, shared[0])
        self._base = shared[0]
        return self._base

    def _fingerprint(self, model: Any, accelerator: Any) -> str:
        """Of all that the base's answers depend on: base, precision, processor, questions, images, length."""
        quantization = getattr(model.config, "quantization_config", None)
        quantization = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
        precision = [str(model.get_input_embeddings().weight.dtype), accelerator.mixed_precision, quantization]
        names = sorted({name for question in self.questions for name in question.images})
        about = [
            model._base_fingerprint,
            precision,
            processor_digest(self.processor),
            self.max_new_tokens,
            [[question.images, question.prompt] for question in self.questions],
            {name: self._digest(name) for name in names},
        ]
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def _digest(self, name: str) -> str | None:
        """Of a picture's file; None where it cannot be read, which is told where it is opened."""
        reader = self.dataset.reader
        content = reader.stored(name) if reader.stored is not None else None
        try:
            if content is None:
                return file_digest(Path(reader.image_folder or "", name))
        except OSError:
            return None
        return hashlib.sha256(content).hexdigest()

    def _write(self, path: Path, key: str, answers: list[str | None]) -> None:
        lines = [
            {"record": question.record, "images": question.images, "prompt": question.prompt, "answer": answer}
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": key, "max_new_tokens": self.max_new_tokens, "questions": lines})


def _read(path: Path, key: str, count: int) -> list[str | None] | None:
    """The base's answers that an earlier run left, or None."""
    if not path.is_file():
        return None
    try:
        saved = read_json(path)
        answers = [line["answer"] for line in saved["questions"]]
        if saved["fingerprint"] == key and len(answers) == count:
            return answers
        reason = "it holds other questions"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"{path} cannot be used ({reason}); the base answers again.", stacklevel=2)
    return None
