"""VLLMCompressor: summaries of images from a vLLM server that runs the compress pass, to fill a cache with.

An image is prepared here, as training prepared it, and goes there at the size that the vision tower takes, without
loss: the engine resizes nothing. Shapes: M images, k summary tokens, D hidden size.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bottleneck import embed
from ..cache.decode import Preparer
from ..checkpoint.export_template import PROMPT_FLAG
from ..compressors import check_prefix
from ..config import check_k
from ..files.pixels import LLAVA, Reading
from ..hosts import host_class
from ..processing.images import prepare_pixels
from .vllm_files import client_files
from .vllm_http import Engine, EngineError
from .vllm_probe import base_of_adapter, command_of
from .vllm_request import EngineModel

POOLING = "/pooling"
HOST = "LlavaForConditionalGeneration"


class VLLMCompressor(EngineModel):
    """In the place of `cache.compressor.Compressor`, without a model on this side; checked when it is made.

    Args:
        url: the engine's, started by the compress command of an export.
        model: an export of `fwd2bot export --to vllm` with the compress stage, or the checkpoint.
        k: summary tokens of an image; None for all. reading, max_pixels, fast: as of Compressor.
        batch_size: images that are with the engine at a time.
        name: what the engine calls the compress adapter.
        api_key, timeout: as of VLLMAnswers.

    Raises:
        EngineError: there is no engine, it lacks the adapter, or ignores it, or does not compress.
        ValueError: the model is none whose compress pass runs in vLLM, k is out of range, or k is less than the
            model's and its summaries have no prefixes.
    """

    def __init__(
        self,
        url: str,
        model: str | os.PathLike,
        k: int | None = None,
        batch_size: int = 16,
        max_pixels: int | None = None,
        reading: Reading = LLAVA,
        fast: bool = False,
        *,
        name: str = "compress",
        api_key: str | None = None,
        timeout: float = 120.0,
    ) -> None:
        files = client_files(model, "compress")
        super().__init__(Engine(url, api_key, timeout), files, name)
        self.k, self.batch_size = k or files.config.num_summary_tokens, batch_size
        check_k(files.config, self.k)
        check_prefix(files.config, self.k)  # the engine makes all tokens
        self.host = host_class(HOST)
        self.prepare = Preparer(files.processor, self.host, max_pixels, reading, fast)
        own = files.processor.image_processor
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (own.image_mean, own.image_std))
        self._check()

    def __call__(self, prepared: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """(summaries [M, k, D], embeddings [M, D]) of images as `prepare` gives their pixels.

        Raises:
            EngineError: the engine refused, or ended; nothing of this batch is there then.
        """
        contents = [self._picture(one["pixel_values"]) for one in prepared]
        with ThreadPoolExecutor(self.batch_size) as pool:  # vLLM makes batches of what comes at once
            summary = torch.stack(list(pool.map(self._summary, contents)))[:, : self.k]
        return summary, embed(summary, self.files.config.pooling)

    # ------------------------------------------------------------------ one image
    def _picture(self, pixels: Tensor) -> str:
        """The prepared image [1, 3, H, W] as a data URI, from which the engine makes the same numbers."""
        levels = (pixels[0].float() * self.std + self.mean) * 255
        image = Image.fromarray(levels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        again = prepare_pixels(self.files.processor, self.host, [image])["pixel_values"]
        if again.shape != pixels.shape or (again - pixels).abs().max() > 1e-4:
            raise ValueError(
                f"{self.files.name}: the base's image processor changes an image that it has prepared, so that vLLM "
                "would see another one: compress without --engine."
            )
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def _summary(self, picture: str, name: str | None = None) -> Tensor:
        """[k, D]"""
        content = [{"type": "image_url", "image_url": {"url": picture}}]
        body = {
            "model": name or self.name,
            "task": "token_embed",
            "messages": [{"role": "user", "content": content}],
            "chat_template_kwargs": {PROMPT_FLAG: True},  # the image alone: no system text, and no first token
            "add_special_tokens": False,
        }
        body |= {"encoding_format": "base64", "embed_dtype": "float32", "endianness": "little"}
        values = self.engine.post(POOLING, body)
        shape = self.files.tokens.shape
        try:
            content = base64.b64decode(values["data"][0]["data"], validate=True)
            numbers = torch.from_numpy(np.frombuffer(content, "<f4").astype("float32"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"The engine at {self.engine.url} gave no numbers ({error!r}).") from error
        if numbers.numel() != shape.numel():
            raise EngineError(
                f"The engine at {self.engine.url} gave {numbers.numel()} numbers for an image, and a summary has "
                f"{shape[0]} x {shape[1]}: it runs another model. Start it by: {command_of(self)}"
            )
        return numbers.view(shape)

    def _check(self) -> None:
        base = base_of_adapter(self)
        pixels = prepare_pixels(self.files.processor, self.host, [Image.new("RGB", (64, 64), (200, 90, 30))])
        picture = self._picture(pixels["pixel_values"])
        own, without = self._summary(picture), self._summary(picture, base)
        if torch.allclose(own, without, rtol=1e-3, atol=1e-4):
            raise EngineError(
                f"The engine at {self.engine.url} compresses with the adapter {self.name!r} exactly as without it: it "
                f"found none of the adapter's tensors. Start it by: {command_of(self)}"
            )
