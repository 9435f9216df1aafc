"""The compress pass: pixels of files to summaries, in batches that fit into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bottleneck import embed
from ..files.pixels import LLAVA, Reading
from ..processing.images import join_pixels
from .codecs import Codec
from .decode import Preparer

READERS = min(4, os.cpu_count() or 1)  # threads that read a batch


class Compressor:
    """Summaries of images; a batch that does not fit into memory is halved, and stays halved.

    Args:
        k: summary tokens of an image; None for all that the model makes.
        max_pixels: of an image, above which it is refused; None for DEFAULT_MAX_PIXELS.
        reading: how files become pictures; of a cache, its own settings.
        fast: decode large JPEGs at a smaller scale.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        k: int | None = None,
        batch_size: int = 8,
        max_pixels: int | None = None,
        reading: Reading = LLAVA,
        fast: bool = False,
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.k = k or model.fwd2bot_config.num_summary_tokens
        self.words = model.get_input_embeddings().weight
        self.prepare = Preparer(processor, model, max_pixels, reading, fast)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """(summaries [M, k, D], embeddings [M, D]), on the model's device."""
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
        return summary, embed(summary, self.model.fwd2bot_config.pooling)


OVERFLOW = "its summary overflows; try --dtype float32, then --retry, or another --codec than {codec}"


def encoded(codec: Codec, summary: Tensor, vectors: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens uint8 [M, k, B], vectors float16 [M, D], which rows the codec can keep: bool [M]); on their device."""
    good = summary.abs().flatten(1).amax(1) <= codec.largest  # [M]; what is not a number is not
    fine = torch.where(good[:, None, None], summary, torch.zeros_like(summary))
    tokens = codec.encode(fine).cpu().numpy()
    return tokens, vectors.half().cpu().numpy(), good.cpu().numpy()
