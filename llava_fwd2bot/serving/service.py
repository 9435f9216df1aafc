"""What the routes share: the model, the engine, the caches, and the images and texts of requests as summaries.

Shapes: k summary tokens, D hidden size, T tokens of a text.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ..cache.search import LONGEST
from ..compressors import check_prefix
from ..files.images import ImageError
from ..processing.conversation import ConversationFormatter
from .caches import Caches
from .engine import AnswerEngine, Compressed, Model, Remote
from .errors import APIError, invalid
from .lifecycle import result_of
from .limits import Limits
from .metrics import Metrics
from .pictures import SCHEME, Fetcher

REMEMBERED = 256 * 2**20  # bytes of summaries of images that came lately


@dataclass
class Seen:
    """An image of a request.

    Args:
        summary: [k, D].
        cached: no compress pass was needed.
        dense: its dense tokens, where they are known; bytes: of its file.
    """

    summary: Tensor
    cached: bool
    dense: int | None = None
    bytes: int | None = None

    def about(self) -> dict[str, Any]:
        own = {"summary_tokens": len(self.summary), "dense_tokens": self.dense, "bytes": self.bytes}
        return {**own, "cached": self.cached}


class Service:
    """The state of one server.

    Args:
        name: of the model, in requests.
        engine: that answers in the place of the model, from the model's summaries.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        name: str,
        limits: Limits,
        caches: Caches,
        fetcher: Fetcher,
        engine: AnswerEngine | None = None,
    ) -> None:
        self.name, self.limits, self.caches, self.fetcher = name, limits, caches, fetcher
        self.created, self.metrics = int(time.time()), Metrics()
        self.model = Model(model, processor, limits, self._observe)
        self.remote = None if engine is None else Remote(engine, limits)
        self.processor, self.formatter = processor, ConversationFormatter(processor)
        self.config = model.fwd2bot_config
        self.k, self.pooling = self.config.num_summary_tokens, self.config.pooling
        self._memory: OrderedDict[str, tuple[Compressed, int]] = OrderedDict()
        self._held = 0
        self.metrics.watch("fwd2bot_requests_waiting", "Jobs that wait for the model", self.model.batcher.waiting)

    def _observe(self, kind: str, size: int) -> None:
        self.metrics.batch.labels(kind).observe(size)

    @property
    def names(self) -> list[str]:
        """The models of this server: Fwd2Bot, and the base, which answers from dense tokens."""
        return [self.name] if self.remote is not None else [self.name, f"{self.name}:base"]

    def check_model(self, name: str | None) -> bool:
        """Whether the base is asked; APIError for a name that is not served."""
        if name is not None and name not in self.names:
            raise APIError(
                404, f"There is no model {name[:100]!r}; there is {', '.join(self.names)}.", "model_not_found", "model"
            )
        return name is not None and name != self.name

    def check_k(self, k: int | None) -> None:
        if k is not None and k > self.k:
            raise invalid(f"This model has {self.k} summary tokens, but k = {k}.", "k", "k_too_large")
        try:
            check_prefix(self.config, k)
        except ValueError as error:
            raise invalid(str(error), "k", "k_without_prefix") from error

    def check_count(self, images: int) -> None:
        if images > self.limits.images:
            raise invalid(
                f"The request has {images} images; up to {self.limits.images} are taken.", "messages", "too_many_images"
            )

    # ------------------------------------------------------------------ images
    async def picture(self, data: bytes, param: str) -> Image.Image:
        try:
            return await asyncio.to_thread(self.model.decode, data, "the image")
        except ImageError as error:
            raise invalid(str(error), param, "invalid_image") from error

    async def seen(self, url: str, param: str, k: int | None = None, cache: str | None = None) -> Seen:
        """The image of a data URI, of an allowed URL, or of a cache, by its first k summary tokens."""
        self.check_k(k)
        if url.startswith(SCHEME):
            image = await asyncio.to_thread(self.caches.find, url[len(SCHEME) :], param, cache)
            summary = await asyncio.to_thread(self.caches.summary, image, k, param)
            self.metrics.summaries.labels("cache").inc()
            return Seen(summary, True, bytes=image.row.get("bytes"))
        data = await asyncio.to_thread(self.fetcher, url, param)
        key = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if key in self._memory:
            self._memory.move_to_end(key)
            found, _ = self._memory[key]
            self.metrics.summaries.labels("memory").inc()
            return Seen(found.summary[:k], True, found.dense, len(data))
        found = await self.compressed(await self.picture(data, param), param)
        self._remember(key, found)
        return Seen(found.summary[:k], False, found.dense, len(data))

    async def compressed(self, image: Image.Image, param: str) -> Compressed:
        try:
            pixels = await asyncio.to_thread(self.model.pixels, image)
        except ImageError as error:
            raise invalid(str(error), param, "invalid_image") from error
        found = await result_of(self.model.submit("compress", pixels))
        self.metrics.summaries.labels("compressed").inc()
        return found

    def _remember(self, key: str, found: Compressed) -> None:
        size = found.summary.nbytes
        if key not in self._memory:
            self._held += size
        self._memory[key] = (found, size)
        while self._held > REMEMBERED:
            _, (_, gone) = self._memory.popitem(last=False)
            self._held -= gone

    # ------------------------------------------------------------------ texts
    async def text(self, text: str, param: str) -> tuple[Tensor, int]:
        """The summary of a text [k, D], and how many tokens the text has."""
        if not text.strip():
            raise invalid("The text is empty.", param, "empty_input")
        if len(text) > 64 * LONGEST:
            raise self._too_long(param, f"{len(text):,} characters")
        ids = await asyncio.to_thread(self.tokens, text.strip(), param)
        if len(ids) > LONGEST:
            raise self._too_long(param, f"{len(ids):,} tokens")
        return await result_of(self.model.submit("text", ids)), len(ids)

    def tokens(self, text: str, param: str) -> Tensor:
        """[T]"""
        try:
            ids = self.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0].long()
        except (UnicodeEncodeError, TypeError) as error:
            raise invalid("The text holds half of a surrogate pair, which is no character.", param) from error
        if not len(ids):
            raise invalid("The text has no token of this model.", param, "empty_input")
        return ids

    def _too_long(self, param: str, has: str) -> APIError:
        most = f"up to {LONGEST} tokens are compressed"
        return invalid(f"The text has {has}; {most}.", param, "context_length_exceeded")

    def close(self) -> None:
        """Finishes what is in hand."""
        self.model.close()
        if self.remote is not None:
            self.remote.close()
