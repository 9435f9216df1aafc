"""An opened image file to RGB pixels: its EXIF orientation, transparency and 16-bit grey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# how an image lies whose EXIF orientation is the key; 1 is upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Reading:
    """How a file becomes a picture. By default as LLaVA's training and evaluation read it: see LLAVA and OWN.

    Args:
        exif_orientation: turn it as its EXIF says, as every viewer does.
        on_white: lay what is transparent onto white; else the colours that are hidden there show.
    """

    exif_orientation: bool = False
    on_white: bool = False

    def as_settings(self) -> dict[str, str]:
        """The settings as caches and files of summaries state them."""
        return {
            "exif_orientation": "on" if self.exif_orientation else "off",
            "transparency": "white" if self.on_white else "hidden",
        }


LLAVA = Reading()  # in training and evaluation
OWN = Reading(exif_orientation=True, on_white=True)  # people's own pictures


def to_rgb(image: Image.Image, reading: Reading) -> Image.Image:
    """The pixels of an opened image as RGB."""
    upright = _UPRIGHT.get(_orientation(image)) if reading.exif_orientation else None
    picture = _convert(image, reading.on_white)
    return picture if upright is None else picture.transpose(upright)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that is damaged says nothing; the pixels are sound, and viewers show them as they lie
        return 1


def _convert(image: Image.Image, on_white: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey opens as "I;16" or, by format, as "I"
        grey = np.asarray(image)
        hidden = grey == image.info["transparency"] if on_white and _is_number(image.info.get("transparency")) else None
        if grey.max(initial=0) > 255:
            grey = grey >> 8
        grey = grey.clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey if hidden is None else np.where(hidden, np.uint8(255), grey)).convert("RGB")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if on_white and transparent:
        if image.mode == "La":
            image = image.convert("LA")
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same colours as in one step, without Pillow's warning
    return image.convert("RGB")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
