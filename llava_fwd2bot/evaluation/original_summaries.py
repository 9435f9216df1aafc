"""LLaVA's evaluation programs on stored summaries: `fwd2bot llava eval … --from-cache FILE`.

The programs open an image, preprocess it and pass its pixels to generate. Here an image is replaced by one pixel whose
colour encodes the row of its summary in the file; no image file is opened.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llava.mm_utils
import torch
from PIL import Image

from ..cache.summary_file import SummaryFile, fingerprint_of
from ..checkpoint.original import fwd2bot_folder
from ..hosts.original import shims


@contextmanager
def from_cache(cache: str, theirs: Sequence[str], load: Callable) -> Iterator[Callable]:
    """Context in which LLaVA's programs read summaries from `cache`, by the image's path below `--image-folder`.

    Args:
        cache: a file of `fwd2bot compress`, made from the same folder by the same model.
        theirs: the program's arguments.
        load: the `load_pretrained_model` to wrap.

    Raises:
        ValueError: the file was made by another model or lacks an image, or the images are not files.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--model-path", default="")
    options, _ = parser.parse_known_args(theirs)
    checkpoint = fwd2bot_folder(options.model_path)
    if checkpoint is None:
        raise ValueError(f"--from-cache needs a Fwd2Bot checkpoint as --model-path, not {options.model_path!r}.")
    store = SummaryFile(cache, fingerprint_of(checkpoint))
    if store.exif_orientation != "off":
        print(
            f"fwd2bot: {cache} was made with EXIF orientation on, but LLaVA's programs do not rotate images, so "
            "results differ for images with that tag. Compress with --exif-orientation off.",
            file=sys.stderr,
        )

    def open_image(path: Any, *args: Any, **kwargs: Any) -> Image.Image:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError("--from-cache needs image files, but this program has the images in its question file.")
        row = store.row(
            Path(os.path.relpath(Path(path).expanduser(), Path(options.image_folder or ".").expanduser())).as_posix()
        )
        return Image.new("RGB", (1, 1), (row >> 16 & 255, row >> 8 & 255, row & 255))

    def process_images(images: Sequence[Image.Image], *ignored: Any) -> torch.Tensor:
        # [M, 3, 1, 1]; numbers up to 255 are exact in every float type
        return torch.tensor([image.getpixel((0, 0)) for image in images], dtype=torch.float32)[..., None, None]

    def load_with_summaries(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, int]:
        tokenizer, model, *rest = load(*args, **kwargs)
        device = model.get_input_embeddings().weight.device

        def stored(image_inputs: dict[str, Any], num_tokens: int | None = None) -> tuple[torch.Tensor, None]:
            colours = torch.stack([image.flatten() for image in image_inputs["images"]]).long()  # [M, 3]
            rows = (colours[:, 0] << 16 | colours[:, 1] << 8 | colours[:, 2]).tolist()
            return store.read(rows, num_tokens).to(device), None

        model._compress_images = stored
        return tokenizer, model, *rest

    with shims.rebound(Image, open=open_image), shims.rebound(llava.mm_utils, process_images=process_images):
        yield load_with_summaries
