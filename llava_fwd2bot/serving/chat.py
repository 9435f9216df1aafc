"""`/v1/chat/completions`: a request becomes a question with its summaries, and an answer at once or in pieces."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from ..processing.batched import Answer
from ..processing.conversation import PLACEHOLDER, prompt_ids
from .batcher import Job
from .engine import Base
from .errors import APIError, api_error, invalid
from .lifecycle import Deadline, gone, result_of, within
from .prompts import Conversation, conversation_of, prompt_of
from .schemas import ChatRequest
from .service import Seen, Service

NEW_TOKENS = 128  # of an answer, where the request does not say
STOPS = 8  # texts that end an answer


def routes(app: FastAPI, service: Service) -> None:

    kinds = {"application/json": {}, "text/event-stream": {}}
    answered = {200: {"description": "The answer, or with stream its pieces", "content": kinds}}

    @app.post("/v1/chat/completions", summary="Answer questions about images", responses=answered)
    async def chat(body: ChatRequest, request: Request) -> Response:
        deadline = Deadline(service.limits.seconds)
        pending = await within(request, prepared(service, body), deadline)
        if body.stream:
            return await pending.stream(request, deadline)
        return JSONResponse(await within(request, pending.whole(), deadline))


async def prepared(service: Service, body: ChatRequest) -> PreparedChat:
    """The question of a request, with its images compressed or read.

    Raises:
        APIError: whatever is wrong with it.
    """
    limits = service.limits
    by_base = service.check_model(body.model)
    service.check_k(body.k)
    answer = _answer(service, body)
    talk = conversation_of(body.messages)
    service.check_count(len(talk.images))
    if sum(len(turn["value"]) for turn in talk.turns) > 64 * limits.prompt_tokens:
        raise _too_long("more characters than any prompt", limits.prompt_tokens)
    if service.remote is not None and len(talk.turns) > 1:
        raise invalid("The engine takes one question, without earlier turns.", "messages")
    prompt = prompt_of(service.formatter, talk)
    ids = await asyncio.to_thread(_ids, service, prompt, len(talk.images))
    tokens = len(ids)
    if tokens > limits.prompt_tokens:
        raise _too_long(f"{tokens:,} tokens", limits.prompt_tokens)
    answer.ids = ids
    seen: list[Seen] = []
    if by_base:
        payload: Any = await _for_base(service, talk, prompt, answer, body.k)
        tokens = await asyncio.to_thread(_dense_length, service, payload, tokens)
    else:
        tasks = [asyncio.ensure_future(service.seen(url, param, body.k)) for url, param in talk.images]
        try:
            seen = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        answer.summaries = [image.summary for image in seen]
        tokens += sum(len(summary) - 1 for summary in answer.summaries)
        if service.remote is not None and len({len(summary) for summary in answer.summaries}) > 1:
            raise invalid("The engine takes images of one number of summary tokens: give k.", "k")
        text = talk.question
        leading = text.startswith(f"{PLACEHOLDER}\n" * len(seen)) and text.count(PLACEHOLDER) == len(seen)
        answer.question = text[len(seen) * (len(PLACEHOLDER) + 1) :] if leading else text
        payload = answer
    room = _positions(service) - answer.max_new_tokens
    if tokens > min(limits.prompt_tokens, room):
        raise _too_long(f"{tokens:,} tokens", min(limits.prompt_tokens, room))
    return PreparedChat(service, body, "base" if by_base else "answer", payload, answer, seen, tokens)


def _answer(service: Service, body: ChatRequest) -> Answer:
    """An answer without its prompt, as long and as random as the request says."""
    limits = service.limits
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream.", "stream_options")
    most = body.max_completion_tokens or body.max_tokens or min(NEW_TOKENS, limits.new_tokens)
    if most > limits.new_tokens:
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        raise invalid(f"{most:,} tokens were asked for; an answer has up to {limits.new_tokens:,}.", name)
    least = body.min_tokens or 0
    if least > most or (least and service.remote is not None):
        reason = "The engine takes no min_tokens" if least <= most else f"min_tokens = {least} is more than max_tokens"
        raise invalid(f"{reason}.", "min_tokens")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > STOPS or not all(stops):
        raise invalid(f"stop takes up to {STOPS} texts, none of them empty.", "stop")
    return Answer(
        torch.empty(0, dtype=torch.long),
        [],
        service.processor.tokenizer,
        max_new_tokens=most,
        min_new_tokens=least,
        stop=stops,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
    )


def _ids(service: Service, prompt: str, images: int) -> Tensor:
    """[T]; APIError where text of the user's became an image token."""
    ids = prompt_ids(service.processor, prompt)["input_ids"][0].long()
    if int((ids == service.model.model._image_token_id()).sum()) != images:
        raise invalid("A text holds the model's image token: give images as parts of messages.", "messages")
    return ids


async def _for_base(service: Service, talk: Conversation, prompt: str, answer: Answer, k: int | None) -> Base:
    if k is not None:
        raise invalid("The base reads dense tokens: leave out k.", "k")
    images = []
    for url, param in talk.images:
        if not url.startswith("cache://"):
            data = await asyncio.to_thread(service.fetcher, url, param)
            images.append(await service.picture(data, param))
        else:
            raise invalid("The base reads images, not the summaries of a cache: send the image.", param)
    return Base(prompt, images, answer)


def _dense_length(service: Service, base: Base, tokens: int) -> int:
    """Tokens of the prompt with all dense tokens."""
    if not base.images or hasattr(service.processor, "tokenize"):
        return tokens
    return service.processor(text=base.prompt, images=base.images, return_tensors="pt")["input_ids"].shape[1]


def _positions(service: Service) -> int:
    config = service.model.model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or 2**31


def _too_long(has: str, most: int) -> APIError:
    message = f"The prompt has {has}; with the answer's there is room for {most:,}."
    return invalid(message, "messages", "context_length_exceeded")


class PreparedChat:
    """A question that is ready for the model, and the two ways to answer it."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        kind: str,
        payload: Any,
        answer: Answer,
        seen: list[Seen],
        tokens: int,
    ) -> None:
        self.service, self.body, self.kind, self.payload = service, body, kind, payload
        self.answer, self.images, self.tokens = answer, seen, tokens
        self.arrived = time.perf_counter()
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.model = body.model or service.name

    def _job(self) -> Job:
        job = Job(self.kind, self.payload)
        self.answer.cancelled = lambda: job.cancelled
        self.answer.begun = self._begun
        runs = self.service.remote if self.service.remote is not None else self.service.model.batcher
        return runs.submit(job)

    def _begun(self) -> None:
        self.service.metrics.first_token.observe(time.perf_counter() - self.arrived)

    def usage(self) -> dict[str, Any]:
        """Tokens; of the prompt `cached` are the summary tokens for which no compress pass was needed."""
        cached = sum(len(image.summary) for image in self.images if image.cached)
        new = len(self.answer.tokens)
        found = {"prompt_tokens": self.tokens, "completion_tokens": new, "total_tokens": self.tokens + new}
        return {**found, "prompt_tokens_details": {"cached_tokens": cached}}

    def _count(self) -> None:
        metrics, usage = self.service.metrics, self.usage()
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.answer_tokens.inc(usage["completion_tokens"])
        metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])

    # ------------------------------------------------------------------ at once
    async def whole(self) -> dict[str, Any]:
        await result_of(self._job())
        self._count()
        message = {"role": "assistant", "content": self.answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.answer.reason, "logprobs": None}
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        images = [image.about() for image in self.images]
        return {**head, "choices": [choice], "usage": self.usage(), "fwd2bot": {"images": images}}

    # ------------------------------------------------------------------ in pieces
    async def stream(self, request: Request, deadline: Deadline) -> Response:
        """Server-sent events; an error before the first of them is an ordinary one, with its status."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()  # texts, then None
        self.answer.emit = lambda text: _call(loop, pieces.put_nowait, text)
        job = self._job()
        job.future.add_done_callback(lambda _: _call(loop, pieces.put_nowait, None))
        try:
            first = await within(request, pieces.get(), deadline)
            if first is None and not job.future.cancelled() and (error := job.future.exception()):
                raise error
        except BaseException:
            job.cancel()
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = self._events(first, pieces, job, request, deadline)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(
        self, piece: str | None, pieces: asyncio.Queue, job: Job, request: Request, deadline: Deadline
    ) -> AsyncIterator[str]:
        watch = asyncio.ensure_future(gone(request))
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while piece is not None:
                yield self._chunk({"content": piece})
                more = asyncio.ensure_future(pieces.get())
                await asyncio.wait({more, watch}, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
                if not more.done():
                    more.cancel()
                    if not watch.done():
                        yield _event(deadline.error().body())
                    return
                piece = more.result()
            if job.future.cancelled():
                return
            if error := job.future.exception():
                yield _event(api_error(error).body())
                return
            self._count()
            yield self._chunk({}, self.answer.reason)
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield self._chunk(None, usage=self.usage())
            yield "data: [DONE]\n\n"
        finally:
            watch.cancel()
            job.cancel()

    def _chunk(
        self, delta: dict[str, Any] | None, reason: str | None = None, usage: dict[str, Any] | None = None
    ) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        more = {} if usage is None else {"usage": usage, "fwd2bot": {"images": [i.about() for i in self.images]}}
        return _event({**head, "choices": choices, **more})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _call(loop: asyncio.AbstractEventLoop, function: Any, *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop has ended: nobody reads any more
        pass
