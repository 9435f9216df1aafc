"""Pictures from disk: opened safely, named in every error, and turned into the host's pixel tensors."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 178_956_970  # where Pillow itself starts to refuse a picture

_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and the remedy."""


def open_image(path: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Open one picture as RGB, with the first frame of an animation and, like LLaVA, without turning it by EXIF.

    Palettes, alpha and CMYK go through `convert("RGB")` as in LLaVA. 16-bit grey is scaled to 8 bits, where a plain
    `convert` would clip it to white.

    Raises:
        ImageError: the file is missing, empty, not a picture, damaged, or has more than `max_pixels` pixels (this is
            read from the header, before any decoding).
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a picture" if path.is_dir() else "no such file"
        raise ImageError(f"{path}: {problem}; check the name and the folder it is looked for in")
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty (0 bytes); download or copy it again")
        with path.open("rb") as file:
            return _decode(file, str(path), max_pixels)
    except PermissionError as error:
        raise ImageError(f"{path}: permission denied; make the file readable") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode_image(
    data: bytes,
    name: str,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    look: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """The picture that is the bytes `data`, as `open_image` gives it; errors name it `name`.

    Args:
        look: called with the opened picture before its pixels are decoded.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes); download or copy it again")
    return _decode(io.BytesIO(data), name, max_pixels, look)


def _decode(
    file: BinaryIO, name: str, max_pixels: int, look: Callable[[Image.Image], None] | None = None
) -> Image.Image:
    try:
        with _open_header(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{name}: {width}x{height} = {width * height:,} pixels, over the limit of {max_pixels:,}; "
                    "make the picture smaller, or raise max_pixels if you trust the file"
                )
            if look is not None:
                look(image)
            return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture that Pillow can read; remove it or convert it to JPEG/PNG") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files: OSError, SyntaxError, ...
        raise ImageError(f"{name}: damaged or truncated ({error}); download or copy it again") from error


def _open_header(file: BinaryIO) -> Image.Image:
    # Pillow's own limit is a global, known only by a pixel count, and stands in the way of a higher max_pixels.
    # It is lifted for the header alone, under a lock; open_image compares the size before anything is decoded.
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey opens as "I;16" or, by format, as "I"
        grey = np.asarray(image)
        if grey.max(initial=0) > 255:
            grey = grey >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same colours as in one step, without Pillow's warning
    return image.convert("RGB")


class ImageReader:
    """Pictures of one record -> pixel tensors and placeholder counts, by the host's own processor.

    Args:
        processor: LLaVA's (or LLaVA-NeXT's) processor.
        image_folder: where relative names are looked for; None leaves names as they stand.
        max_pixels: see `open_image`.
    """

    def __init__(self, processor: Any, image_folder: str | Path | None, max_pixels: int = DEFAULT_MAX_PIXELS):
        if getattr(processor, "patch_size", 0) is None:
            raise ValueError(
                "the processor has no patch_size, so it cannot say how many tokens a picture takes; set "
                "processor.patch_size and processor.vision_feature_select_strategy from the model's vision config"
            )
        self.processor = processor
        self.image_folder = image_folder
        self.max_pixels = max_pixels
        self.image_token = processor.image_token
        image_token_id = getattr(processor, "image_token_id", None)
        if image_token_id is None:
            image_token_id = processor.tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_token_id = image_token_id
        self._counts: dict[tuple[int, int], int] = {}

    def __call__(self, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Read the pictures.

        Returns:
            the image processor's tensors, `pixel_values` [N, 3, H, W] (LLaVA-NeXT: [N, P, 3, H, W] and `image_sizes`
            [N, 2]), and how many placeholder ids each picture stands for.
        """
        images = [self._open(name) for name in names]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        kept = {key: pixels[key] for key in ("pixel_values", "image_sizes") if key in pixels}
        return kept, [self._count(image) for image in images]

    def _open(self, name: str) -> Image.Image:
        try:
            return open_image(Path(self.image_folder or "", name), self.max_pixels)
        except ImageError as error:
            raise ImageError(f"{error} (--image_folder is {str(self.image_folder or '')!r})") from error

    def _count(self, image: Image.Image) -> int:
        # Asking the processor, not computing, is one code path for LLaVA-1.5 and NeXT and cannot drift from either.
        if image.size not in self._counts:
            ids = self.processor(text=self.image_token, images=image, return_tensors="pt")["input_ids"]
            count = int((ids == self.image_token_id).sum())
            if count == 0:
                raise ValueError(f"the processor made no {self.image_token!r} id for a picture of size {image.size}")
            self._counts[image.size] = count
        return self._counts[image.size]


def prepare_pixels(processor: Any, model: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What the host's model takes for `images`, as its image processor gives it."""
    found = processor.image_processor(images=list(images), return_tensors="pt")
    return {name: found[name] for name in dict.fromkeys(("pixel_values", *model.image_input_names)) if name in found}


def join_pixels(parts: Sequence[dict[str, Any]], like: torch.Tensor) -> dict[str, Any]:
    """One batch of several `prepare_pixels`, on the device and in the precision of `like`."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    joined: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if isinstance(values[0], list):  # the original LLaVA's: one entry for each image, of crops or of one
            values = [moved(value) for part in values for value in part]
            plain = name == "images" and all(v.dim() == 3 and v.shape == values[0].shape for v in values)
            joined[name] = torch.stack(values) if plain else values
        else:
            joined[name] = moved((stack_pixels if name == "pixel_values" else torch.cat)(values))
    return joined


def stack_pixels(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate the rows' pixel values: N x [n_i, 3, H, W] -> [M, 3, H, W].

    LLaVA-NeXT's [n_i, P_i, 3, H, W] are padded with zero crops to the largest P; the model drops them again.
    """
    if parts[0].dim() == 5:
        crops = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0) * 3 + (0, crops - part.shape[1])) for part in parts]
    return torch.cat(list(parts))
