"""The compress pass: pixels of files to summaries, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bottleneck import embed
from ..processing.images import DEFAULT_MAX_PIXELS, decode_image, join_pixels, prepare_pixels
from .codecs import Codec
from .decode import drafted, exif_of, read_file, target_of


@dataclass(slots=True)
class Prepared:
    """An image as the model takes it; its size; what its EXIF says."""

    pixels: dict[str, Any]
    size: tuple[int, int]
    exif: dict[str, Any]


class Compressor:
    """Summaries of images; a batch that does not fit into memory is halved, and stays halved.

    Args:
        k: summary tokens of an image; None for all that the model makes.
        max_pixels: of an image, above which it is refused; None for DEFAULT_MAX_PIXELS.
        fast: decode large JPEGs at a smaller scale.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        k: int | None = None,
        batch_size: int = 8,
        max_pixels: int | None = None,
        fast: bool = False,
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.k = k or model.fwd2bot_config.num_summary_tokens
        self.max_pixels = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
        self.words = model.get_input_embeddings().weight
        self.target = target_of(processor) if fast else None

    def prepare(self, data: bytes, name: str) -> Prepared:
        """The image that is these bytes, as the model takes it. ValueError, with `name` in it: it cannot be used."""
        exif: dict[str, Any] = {}
        size: list[tuple[int, int]] = []

        def look(image: Any) -> None:
            size.append(image.size)
            exif.update(exif_of(image))
            if self.target is not None:
                drafted(image, self.target)

        image = decode_image(data, name, self.max_pixels, look)
        return Prepared(prepare_pixels(self.processor, self.model, [image]), size[0], exif)

    def prepare_file(self, path: Path) -> Prepared:
        return self.prepare(read_file(str(path)), str(path))

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
