"""LLaVA's evaluation programs on stored summaries: `fwd2bot llava eval … --from-cache FILE`.

The programs open an image, prepare it and hand its pixels to generate, and have no option for anything else. Here a
picture is one pixel, whose colour is the number of its row in the file; no image is opened.
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
    """Within it LLaVA's programs read summaries from `cache`, by the image's name below `--image-folder`.

    Args:
        cache: a file of `fwd2bot compress`, made of the same folder by the same model.
        theirs: the program's arguments.
        load: the `load_pretrained_model` in use; the one to use is what is given.

    Raises:
        ValueError: the file is of another model, or lacks an image; the images are no files.
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
            f"fwd2bot: {cache} was made with EXIF orientation on, and LLaVA's programs do not turn images: where yours "
            "have it, figures differ. Compress with --exif-orientation off.",
            file=sys.stderr,
        )

    def open_image(path: Any, *args: Any, **kwargs: Any) -> Image.Image:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError("--from-cache needs images that are files: this program has them in its question file.")
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
