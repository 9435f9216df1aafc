"""The compress pass over files: read ahead in threads, in batches that fit into memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bottleneck import embed
from ..files.images import LLAVA, Reading
from ..processing.images import DEFAULT_MAX_PIXELS, join_pixels, open_image, prepare_pixels, prepared_size

READERS = min(4, os.cpu_count() or 1)
Made = tuple[tuple[int, int], Tensor, Tensor]  # width and height, summary [k, D], unit vector [D]


class Compressor:
    """Summaries of images; a batch that does not fit into memory is halved, and stays halved.

    Args:
        k: summary tokens of an image; None for all that the model makes.
        max_pixels: of an image, above which it is refused; None for DEFAULT_MAX_PIXELS.
        reading: how files become pictures; of a cache, its own settings.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        k: int | None = None,
        batch_size: int = 8,
        max_pixels: int | None = None,
        reading: Reading = LLAVA,
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.k = k or model.fwd2bot_config.num_summary_tokens
        self.max_pixels = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
        self.reading, self._prepared = reading, prepared_size(processor)
        self.words = model.get_input_embeddings().weight

    def prepare(self, path: Path) -> tuple[dict[str, Any], tuple[int, int]]:
        """An image as the model takes it, and its width and height. ValueError, OSError: it cannot be used."""
        image = open_image(path, self.max_pixels, self.reading, self._prepared)
        return prepare_pixels(self.processor, self.model, [image]), image.size

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """(summaries [M, k, D], embeddings [M, D])"""
        parts, at = [], 0
        while at < len(prepared):
            try:
                pixels = join_pixels(list(prepared[at : at + self.batch_size]), self.words)
                parts.append(self.model.compress(**pixels, num_tokens=self.k))
                at += self.batch_size
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                torch.cuda.empty_cache()
        summary = torch.cat(parts)
        return summary.cpu(), embed(summary, self.model.fwd2bot_config.pooling).cpu()

    def each(
        self, images: dict[Hashable, Path], workers: int | None = None
    ) -> Iterator[tuple[Any, Made | ValueError | OSError]]:
        """What was made of each image, or why nothing was; in order, but that the unusable come first in a batch."""
        batch: list[tuple[Any, dict[str, Any], tuple[int, int]]] = []
        prepared = ahead(self.prepare, images.values(), 2 * self.batch_size, workers)
        for left, (key, future) in zip(range(len(images) - 1, -1, -1), zip(images, prepared, strict=True), strict=True):
            try:
                batch.append((key, *future.result()))
            except (ValueError, OSError) as error:
                yield key, error
            if batch and (len(batch) >= self.batch_size or not left):
                made = self([pixels for _, pixels, _ in batch])
                for (own, _, size), summary, vector in zip(batch, *made, strict=True):
                    yield own, (size, summary, vector)
                batch.clear()


def ahead(
    prepare: Callable[[Path], Any], paths: Iterable[Path], most: int, workers: int | None = None
) -> Iterator[Future]:
    """`prepare` of each path in threads, in order; at most `most` ahead of what is taken, so that memory is bounded."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(workers or READERS) as pool:
        try:
            for path in paths:
                waiting.append(pool.submit(prepare, path))
                if len(waiting) > most:
                    yield waiting.popleft()
            yield from waiting
        finally:  # Ctrl-C does not wait for what is queued
            pool.shutdown(wait=False, cancel_futures=True)
