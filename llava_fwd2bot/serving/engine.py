"""Who answers: the model in this process, or an engine elsewhere that takes summaries.

Shapes: M images, k summary tokens, D hidden size, n dense tokens, T tokens of a text.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..files.images import decode_image
from ..files.pixels import OWN, Reading
from ..modeling.attention import attention_maps
from ..processing.batched import SLICE, Answer, Rows, ends_of, run
from ..processing.generate import from_base
from ..processing.images import join_pixels, prepare_pixels, prepared_size
from .batcher import Batcher, Job
from .errors import APIError, busy
from .limits import Limits

log = logging.getLogger("fwd2bot.serve")


class AnswerEngine(Protocol):
    """An engine elsewhere, such as `serving.vllm.VLLMAnswers`."""

    def answer(self, question: str, *, summary: Tensor | None, stream: Literal[True], **options: Any) -> Iterator[str]:
        """The pieces of an answer as they come.

        Args:
            question: plain text, without the chat template; `<image>` where an image stands in it, or none at all.
            summary: of its images in order, [M, k, D], as `compress` gives them; None without images.
            options: max_new_tokens, temperature, top_p, and seed and stop where they are asked for.
        """
        ...


@dataclass
class Compressed:
    """The summary of an image [k, D] on the CPU, in the precision of the model; its dense tokens n."""

    summary: Tensor
    dense: int


@dataclass
class Base:
    """A question that the base answers from the dense tokens of its images."""

    prompt: str
    images: list[Image.Image]
    answer: Answer


class Model:
    """The model in this process; what it does, it does in the batcher's thread.

    Args:
        observe: called with the kind and the size of each batch.
    """

    def __init__(
        self, model: nn.Module, processor: Any, limits: Limits, observe: Callable[[str, int], None] = lambda k, n: None
    ) -> None:
        self.model, self.processor, self.limits, self.observe = model, processor, limits, observe
        self.config = model.fwd2bot_config
        self.like = model.get_input_embeddings().weight
        self._prepared = prepared_size(processor)
        runs = {"answer": self._answer, "compress": self._compress, "text": self._text}
        runs |= {"base": self._base, "look": self._look}
        sizes = {"answer": limits.batch, "compress": limits.batch, "text": limits.batch, "base": 1, "look": 1}
        self.batcher = Batcher({kind: self._observed(call) for kind, call in runs.items()}, sizes, limits.queue)

    def _observed(self, call: Callable[[list[Job]], Any]) -> Callable[[list[Job]], Any]:
        @torch.inference_mode()
        def observed(jobs: list[Job]) -> Any:
            self.observe(jobs[0].kind, len(jobs))
            return call(jobs)

        return observed

    # ------------------------------------------------------------------ in any thread
    def decode(self, data: bytes, name: str, reading: Reading = OWN) -> Image.Image:
        """The picture in a file's bytes; ImageError where it cannot be used."""
        return decode_image(data, name, self.limits.pixels, reading, self._prepared)

    def pixels(self, image: Image.Image) -> dict[str, Any]:
        """What the model takes for a picture; ImageError where it becomes huge."""
        return prepare_pixels(self.processor, self.model, [image])

    # ------------------------------------------------------------------ in the batcher's thread
    def _answer(self, jobs: list[Job]) -> list[Job]:
        rest = run(self.model, [job.payload for job in jobs], self._leave)
        going = {id(answer) for answer in rest}
        for job in jobs:
            if job.payload.reason is not None:
                job.finish(job.payload)
            elif job.cancelled:
                job.future.cancel()
        return [job for job in jobs if id(job.payload) in going]

    def _leave(self, going: int, steps: int) -> bool:
        """Whether a batch stops here: where others wait, and there is room for them or they are of another kind."""
        waiting = self.batcher.waiting()
        if not waiting:
            return False
        alike, room = self.batcher.waiting("answer"), self.limits.batch - going
        if steps >= SLICE:
            return waiting > alike or room > 0
        return alike > 0 and 2 * room >= self.limits.batch and steps >= SLICE // 4

    def _compress(self, jobs: list[Job]) -> None:
        pixels = join_pixels([job.payload for job in jobs], self.like)
        summaries, lengths = self.model._compress_images(pixels)
        for job, summary, dense in zip(jobs, summaries.cpu(), lengths, strict=True):
            job.finish(Compressed(summary.clone(), dense))

    def _text(self, jobs: list[Job]) -> None:
        rows = [job.payload for job in jobs]  # [T] each
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        summaries = self.model.compress_text(ids.to(self.like.device), mask.to(self.like.device)).cpu()
        for job, summary in zip(jobs, summaries, strict=True):
            job.finish(summary.clone())

    def _base(self, jobs: list[Job]) -> None:
        for job in jobs:
            request: Base = job.payload
            rows = Rows([request.answer], ends_of(self.model), lambda going, steps: False)
            from_base(self.model, self.processor, request.prompt, request.images, **rows.options())
            job.finish(request.answer)

    def _look(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.finish(attention_maps(self.model, **join_pixels([job.payload], self.like))[0].cpu())

    # ------------------------------------------------------------------
    def submit(self, kind: str, payload: Any, emit: Callable[[str], None] | None = None) -> Job:
        return self.batcher.submit(Job(kind, payload, emit))

    def close(self) -> None:
        self.batcher.close(self.limits.seconds)


class Remote:
    """Answers by an engine elsewhere, each request in a thread of its own; the engine makes the batches.

    Args:
        threads: requests at the engine at once.
    """

    def __init__(self, engine: AnswerEngine, limits: Limits, threads: int = 64) -> None:
        self.engine, self.limits = engine, limits
        self._pool = ThreadPoolExecutor(threads, "engine")
        self._places = threading.Semaphore(limits.queue)

    def submit(self, job: Job) -> Job:
        if not self._places.acquire(blocking=False):
            raise busy(f"{self.limits.queue} requests wait already: try again later.")
        job.future.add_done_callback(lambda _: self._places.release())
        self._pool.submit(self._run, job)
        return job

    def _run(self, job: Job) -> None:
        answer: Answer = job.payload
        options = {"max_new_tokens": answer.max_new_tokens, "temperature": answer.temperature, "top_p": answer.top_p}
        options |= {} if answer.seed is None else {"seed": answer.seed}
        options |= {"stop": list(answer.stop)} if answer.stop else {}
        summary = torch.stack(list(answer.summaries)) if answer.summaries else None
        try:
            pieces = self.engine.answer(answer.question, summary=summary, stream=True, **options)
            for piece in pieces:
                if job.cancelled:
                    if hasattr(pieces, "close"):
                        pieces.close()  # the engine is told, and frees the place
                    job.future.cancel()
                    return
                if not answer.text:
                    answer.begun()
                    piece = piece.lstrip()  # as all answers are
                answer.text += piece
                if answer.emit is not None and piece:
                    answer.emit(piece)
            answer.tokens = answer.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            answer.reason = "length" if len(answer.tokens) >= answer.max_new_tokens else "stop"
            job.finish(answer)
        except Exception as error:
            log.error("the engine failed", exc_info=error)
            job.fail(APIError(502, f"The engine failed ({type(error).__name__}: {error}).", "engine_failed"))

    def close(self) -> None:
        self._pool.shutdown(wait=True)
