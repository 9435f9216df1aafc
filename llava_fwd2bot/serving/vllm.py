"""VLLMAnswers: questions about stored summaries, answered by a vLLM server that runs the base with our answer adapter.

    answers = VLLMAnswers("http://localhost:8000", model="my-export", cache="photos.cache")
    answers.answer("How many people are there?", ids=["beach/012.jpg"])
    for piece in answers.answer("Describe both images.", ids=["a.jpg", "b.jpg"], stream=True): …

The engine keeps the base and the adapter, this side keeps summaries, bridge and conversation. A summary goes there as
an image's embeddings, which vLLM puts where the image's placeholder is; its name is a hash of its numbers, by which the
engine knows it again. To a merged export, which knows no images, it goes as rows of the prompt.

Shapes: M images, k summary tokens, D hidden size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..cache.reader import SummaryCache
from ..config import check_k
from ..processing.answer import untrained_k
from ..processing.conversation import PLACEHOLDER
from .vllm_files import client_files
from .vllm_http import Engine, EngineError
from .vllm_probe import check_engine, models_of
from .vllm_request import CHAT, EngineModel


@dataclass
class Completion:
    """One answer, with what the engine says of it."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str | None


class VLLMAnswers(EngineModel):
    """A connection to an engine; it is checked when it is made.

    Args:
        url: the engine's, e.g. http://localhost:8000.
        model: an export of `fwd2bot export --to vllm`, or of --to merged --stage answer, or the checkpoint, served as
            for the former; default: the checkpoint that filled the cache.
        cache: the cache of summaries, by its path or opened; None where summaries are given with each question.
        name: what the engine calls the answer adapter; default: "answer", and of a merged export the model it has.
        api_key: the engine's, where it wants one.
        timeout: seconds without a byte after which a request is given up.
        probe: ask the engine some questions first; see `check_engine`.

    Raises:
        EngineError: there is no engine, or not the one of this model; the message says what was seen.
        ValueError: the cache is of another model, or neither model nor cache is given.
    """

    def __init__(
        self,
        url: str,
        model: str | os.PathLike | None = None,
        cache: str | os.PathLike | SummaryCache | None = None,
        *,
        name: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        probe: bool = True,
    ) -> None:
        engine = Engine(url, api_key, timeout)
        if isinstance(cache, (str, os.PathLike)):
            cache = SummaryCache.open(cache)
        if model is None:
            if cache is None:
                raise ValueError("Give the model (an export or a checkpoint), or a cache, which names its own.")
            model = cache.settings.model
            if not model:
                raise ValueError(f"{cache.path} does not say which model filled it: give the model.")
        files = client_files(model)
        if name is None:
            name = next(iter(models_of(engine)), "") if files.merged else "answer"
        super().__init__(engine, files, name)
        if cache is not None and cache.settings.fingerprint != self.files.fingerprint:
            raise ValueError(f"{cache.path} was filled by another model than {model}: give the one that filled it.")
        self.cache = cache
        if probe:
            check_engine(self)

    # ------------------------------------------------------------------ questions
    @overload
    def answer(
        self,
        question: str,
        ids: Sequence[str] = (),
        *,
        summary: Tensor | None = None,
        k: int | None = None,
        stream: Literal[False] = False,
        **options: Any,
    ) -> str: ...
    @overload
    def answer(
        self,
        question: str,
        ids: Sequence[str] = (),
        *,
        summary: Tensor | None = None,
        k: int | None = None,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[str]: ...
    def answer(
        self,
        question: str,
        ids: Sequence[str] = (),
        *,
        summary: Tensor | None = None,
        k: int | None = None,
        stream: bool = False,
        **options: Any,
    ) -> str | Iterator[str]:
        """The answer to one question about one image or several.

        Args:
            question: `<image>` in it says where an image stands; otherwise they come first.
            ids: of the cache. summary: [M, k, D], or [k, D] of one image, instead of ids; as `compress` gives them,
                without the bridge.
            k: use the first k summary tokens.
            stream: give an iterator over the pieces of the answer, as they come.
            options: max_new_tokens (128), temperature (0), and whatever else the engine takes.

        Raises:
            ValueError: an empty question, no image for a placeholder, an unknown id, k out of range.
            EngineError: the engine refused, or ended before it was done.
        """
        body = self._body(question, self._summaries(ids, summary, k), options)
        if stream:
            return self._pieces(body)
        return self._complete(body).text

    def complete(
        self,
        question: str,
        ids: Sequence[str] = (),
        *,
        summary: Tensor | None = None,
        k: int | None = None,
        **options: Any,
    ) -> Completion:
        """As `answer`, with the ids of the answer's tokens and how long the prompt was."""
        return self._complete(self._body(question, self._summaries(ids, summary, k), options))

    def _summaries(self, ids: Sequence[str], summary: Tensor | None, k: int | None) -> Tensor:
        """[M, k, D] as the language model reads them."""
        check_k(self.files.config, k)
        if warning := untrained_k(self.files.config, k):
            warnings.warn(warning, stacklevel=3)
        if isinstance(ids, str):
            ids = [ids]
        if summary is not None:
            if len(ids):
                raise ValueError("Give either ids or summary, not both.")
            summary = summary[None] if summary.dim() == 2 else summary
            size = self.files.tokens.shape[1]
            if summary.dim() != 3 or summary.shape[-1] != size:
                raise ValueError(f"A summary is [k, {size}], or [images, k, {size}], not {list(summary.shape)}.")
            if k is not None and k > summary.shape[1]:
                raise ValueError(f"The summaries hold {summary.shape[1]} tokens per image, but k = {k}.")
            summary = summary[:, :k]
        elif len(ids):
            if self.cache is None:
                raise ValueError("ids are of a cache, and there is none: VLLMAnswers(url, cache=…).")
            summary = self.cache.get(ids, k)
        else:
            return torch.empty(0, self.files.config.num_summary_tokens, self.files.tokens.shape[1])
        with torch.inference_mode():
            return self.files.bridge(summary.detach().cpu().to(self.files.tokens.dtype))

    def _body(self, question: str, summary: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        if not question.replace(PLACEHOLDER, "").strip():
            raise ValueError("The question is empty.")
        count = question.count(PLACEHOLDER)
        if count not in (0, len(summary)):
            raise ValueError(f"The question holds {count} {PLACEHOLDER}, and {len(summary)} image(s) belong to it.")
        options = dict(options)
        body = self.request(self.formatter.prompt(question, len(summary)), summary)
        body |= {"model": self.name, "temperature": options.pop("temperature", 0.0)}
        return body | {"max_tokens": options.pop("max_new_tokens", 128), "return_token_ids": True, **options}

    # ------------------------------------------------------------------ the engine's answers
    def _complete(self, body: dict[str, Any]) -> Completion:
        values = self.engine.post(CHAT, body)
        try:
            choice = values["choices"][0]
            text, ids = choice["message"]["content"] or "", choice.get("token_ids") or []
            return Completion(text.strip(), ids, values["usage"]["prompt_tokens"], choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(
                f"The engine at {self.engine.url} gave no answer of OpenAI's form ({error!r})."
            ) from error

    def _pieces(self, body: dict[str, Any]) -> Iterator[str]:
        written = ""
        try:
            for event in self.engine.stream(CHAT, body):
                choices = event.get("choices") or [{}]  # the last event may hold the usage alone
                piece = (choices[0].get("delta") or {}).get("content")
                if piece:
                    written += piece
                    yield piece
        except EngineError as error:
            message = f"{error} It had written {written.strip()!r}." if written else str(error)
            raise EngineError(message, error.status) from error
