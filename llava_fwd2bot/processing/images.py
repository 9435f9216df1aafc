"""Pictures to the host's pixel tensors; how their files are opened is in files/images.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..files.images import DEFAULT_MAX_PIXELS, ImageError, check_prepared, decode_image, open_image

__all__ = ["DEFAULT_MAX_PIXELS", "ImageError", "ImageReader", "join_pixels", "open_image", "prepare_pixels"]

# of the original LLaVA's configuration: how it prepares a picture
_ORIGINAL_SETTINGS = ("image_aspect_ratio", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution")


def prepared_size(processor: Any) -> Callable[[tuple[int, int]], int]:
    """How many pixels, at the most, the host's own preparation makes of a picture of (width, height) on its way.

    LLaVA-1.5 resizes by the shorter side, and crops only then; or pads to a square. LLaVA-NeXT's and OneVision's crops
    have sizes of their own, whatever the picture's.
    """
    return partial(_prepared_size, preparation(processor))


def _prepared_size(settings: dict[str, Any], size: tuple[int, int]) -> int:
    (width, height), target = size, settings.get("size") or {}
    aspect = settings.get("image_aspect_ratio") or ""  # the original LLaVA's
    if settings.get("image_grid_pinpoints") and (not aspect or "anyres" in aspect) or aspect == "highres":
        return 0
    largest = width * height
    if aspect == "pad" or (settings.get("do_pad") and settings.get("do_resize", True)):
        width = height = max(size)
        largest = width * height
    if not settings.get("do_resize", True):
        return largest
    shortest = target.get("shortest_edge")
    if not shortest:
        return max(largest, (target.get("height") or 0) * (target.get("width") or 0))
    longer = -(-shortest * max(width, height) // max(1, min(width, height)))
    return max(largest, shortest * min(longer, target.get("longest_edge") or longer))


def preparation(processor: Any) -> dict[str, Any]:
    """The settings by which the host turns a picture into pixel values, as its image processor is saved."""
    own = getattr(processor, "clip_processor", None) or processor.image_processor
    settings = json.loads(json.dumps(own.to_dict(), default=str)) if hasattr(own, "to_dict") else {}
    config = getattr(processor, "config", None)
    for name in _ORIGINAL_SETTINGS if hasattr(processor, "clip_processor") else ():
        if getattr(config, name, None) is not None:
            settings[name] = getattr(config, name)
    return {**settings, "image_processor_type": type(own).__name__}


def processor_digest(processor: Any) -> str:
    """Of all that a processor does to pictures and texts: what was made with another is of another digest."""
    tokenizer = processor.tokenizer
    if hasattr(tokenizer, "backend_tokenizer"):
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words = {
            name: value for name, value in words.items() if name not in ("padding", "truncation")
        }  # of the last call
    else:
        words = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    settings = [preparation(processor), words, template, {n: str(t) for n, t in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


class ImageReader:
    """Pictures of one record -> pixel tensors and placeholder counts, by the host's own processor.

    Args:
        processor: LLaVA's (or LLaVA-NeXT's) processor.
        image_folder: where relative names are looked for; None leaves names as they stand.
        max_pixels: see `open_image`.
        image_input_names: what is kept of the image processor's tensors; None keeps all.
        stored: gives the file's bytes for names of pictures that are stored in a table, and None for other names.
    """

    def __init__(
        self,
        processor: Any,
        image_folder: str | Path | None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        image_input_names: Sequence[str] | None = None,
        stored: Callable[[str], bytes | None] | None = None,
    ):
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
        self.image_input_names = image_input_names
        self.stored = stored
        # LLaVA-OneVision's: n and the crops of an image depend on how many images its row has
        self._per_row = "batch_num_images" in getattr(processor.image_processor, "model_input_names", ())
        self._prepared = prepared_size(processor)
        self._counts: dict[Any, Any] = {}

    def __call__(self, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Read the pictures.

        Returns:
            the image processor's tensors, `pixel_values` [N, 3, H, W] (LLaVA-NeXT: [N, P, 3, H, W] and `image_sizes`
            [N, 2]; LLaVA-OneVision: `batch_num_images` [1] too), and how many placeholder ids each picture stands for.

        Raises:
            ImageError: a picture cannot be used; its name is the error's `image`.
        """
        images = []
        for name in names:
            try:
                images.append(self.open(name))
            except ImageError as error:
                error.image = name
                raise
        given = [images] if self._per_row else images
        pixels = self.processor.image_processor(images=given, return_tensors="pt")
        kept = {
            key: value
            for key, value in pixels.items()
            if isinstance(value, torch.Tensor) and key in (self.image_input_names or pixels)
        }
        return kept, self._row_counts(images) if self._per_row else [self._count(image) for image in images]

    def open(self, name: str) -> Image.Image:
        """The picture of that name. Raises ImageError where it cannot be used."""
        data = None if self.stored is None else self.stored(name)
        if data is not None:
            return decode_image(data, name, self.max_pixels, prepared=self._prepared)
        try:
            return open_image(Path(self.image_folder or "", name), self.max_pixels, prepared=self._prepared)
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

    def _row_counts(self, images: Sequence[Image.Image]) -> list[int]:
        """`_count` of each image, where it depends on the others of its row."""
        sizes = tuple(image.size for image in images)
        if sizes not in self._counts:
            text = "\n".join([self.image_token] * len(images))  # a line end between two runs of placeholders
            ids = self.processor(text=text, images=[list(images)], return_tensors="pt")["input_ids"][0]
            runs = "".join("x" if here else " " for here in (ids == self.image_token_id).tolist()).split()
            if len(runs) != len(images):
                raise ValueError(
                    f"the processor made {len(runs)} runs of {self.image_token!r} for {len(images)} pictures"
                )
            self._counts[sizes] = [len(run) for run in runs]
        return self._counts[sizes]


def check_sizes(processor: Any, images: Sequence[Image.Image]) -> None:
    """ImageError where one of `images`, which may come from no file, would become huge in the host's preparation."""
    prepared = prepared_size(processor)
    for image in images:
        check_prepared(image.size, prepared, "an image")


def prepare_pixels(processor: Any, model: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What the host's model takes for `images`, as its image processor gives it.

    Raises:
        ImageError: an image would become huge; see `files.images.check_prepared`.
    """
    check_sizes(processor, images)
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
