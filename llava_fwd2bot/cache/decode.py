"""Bytes to pixels. A file is read once; the bytes that are hashed are the bytes that are decoded."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from PIL import ExifTags, Image

from ..files.images import DEFAULT_MAX_PIXELS, decode_image
from ..files.pixels import LLAVA, Reading
from ..files.regular import open_regular
from .entries import Entry

HELD = 512 * 2**20  # bytes of a file, above which it is no image that anyone compresses


@dataclass(slots=True)
class Content:
    """The bytes of an entry and their SHA-256 in hexadecimal."""

    data: bytes
    key: str


def read_content(entry: Entry) -> Content:
    """OSError where it cannot be read, ValueError where it is no file to be read at all."""
    data = entry.read() if entry.read is not None else read_file(entry.source)
    return Content(data, hashlib.sha256(data).hexdigest())


def read_file(path: str) -> bytes:
    """The bytes of a regular file; anything else is not opened, and not waited for if it takes a file's place."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > HELD:
            raise ValueError(f"{path}: has {size:,} bytes, over the limit of {HELD:,}")
        return file.read()


@dataclass(slots=True)
class Prepared:
    """An image as the model takes it; its size; what its EXIF says."""

    pixels: dict[str, Any]
    size: tuple[int, int]
    exif: dict[str, Any]


class Preparer:
    """Bytes to pixels as the model takes them; holds no model, so that it runs where none is.

    Args:
        host: the model or its class, for the names of what it takes.
        max_pixels: of an image, above which it is refused; None for DEFAULT_MAX_PIXELS.
        reading: how files become pictures; of a cache, its own settings.
        fast: decode large JPEGs at a smaller scale.
    """

    def __init__(
        self,
        processor: Any,
        host: Any,
        max_pixels: int | None = None,
        reading: Reading = LLAVA,
        fast: bool = False,
    ) -> None:
        from ..processing.images import prepared_size

        self.processor, self.host = processor, host
        self.max_pixels = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
        self.reading, self._prepared = reading, prepared_size(processor)
        self.target = target_of(processor) if fast else None

    def __call__(self, data: bytes, name: str) -> Prepared:
        """ValueError, with `name` in it: it cannot be used."""
        from ..processing.images import prepare_pixels

        exif: dict[str, Any] = {}
        size: list[tuple[int, int]] = []

        def look(image: Any) -> None:
            size.append(image.size)
            exif.update(exif_of(image))
            if self.target is not None:
                drafted(image, self.target)

        image = decode_image(data, name, self.max_pixels, self.reading, self._prepared, look)
        return Prepared(prepare_pixels(self.processor, self.host, [image]), size[0], exif)


def exif_of(image: Image.Image) -> dict[str, Any]:
    """What a camera has written, where it has: `taken` (by its own clock, "2024-12-31 23:59:59"), `camera`, `latitude`,
    `longitude`."""
    found: dict[str, Any] = {}
    try:
        exif = image.getexif()
        if not exif:
            return found
        own = exif.get_ifd(ExifTags.IFD.Exif)
        if taken := own.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime):
            found["taken"] = _time(str(taken))
        if camera := exif.get(ExifTags.Base.Model):
            found["camera"] = _text(str(camera))
        place = exif.get_ifd(ExifTags.IFD.GPSInfo)
        for name, number, side in (("latitude", 2, 1), ("longitude", 4, 3)):
            if number in place:
                found[name] = _degrees(place[number], str(place.get(side, "")))
    except Exception:  # EXIF that is damaged says nothing; the pixels are sound
        pass
    return {name: value for name, value in found.items() if value is not None}


def _time(text: str) -> str | None:
    found = re.match(r"(\d{4})\D(\d\d)\D(\d\d)\D(\d\d)\D(\d\d)\D(\d\d)", text)
    try:
        return str(datetime(*map(int, found.groups()))) if found else None
    except ValueError:  # 0000:00:00
        return None


def _text(text: str) -> str | None:
    text = text.encode("utf-8", "replace").decode().strip("\0 ")
    return text[:200] or None


def _degrees(parts: Any, side: str) -> float | None:
    degrees, minutes, seconds = (float(part) for part in parts)
    value = degrees + minutes / 60 + seconds / 3600
    return None if value != value or value > 180 else -value if side.upper() in ("S", "W") else value


def drafted(image: Image.Image, target: int) -> None:
    """Has a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, with the shorter side still at least twice `target`."""
    if image.format == "JPEG" and min(image.size) >= 4 * target:
        scale = min(image.size) / (2 * target)
        image.draft("RGB", (int(image.width / scale), int(image.height / scale)))


def target_of(processor: Any) -> int:
    """The longest side, in pixels, of what the host's image processor makes."""
    own = getattr(processor, "image_processor", None)
    sizes: list[int] = []
    for value in (getattr(own, "size", None), getattr(own, "crop_size", None)):
        sizes += [x for x in dict(value or {}).values() if isinstance(x, int)]
    for point in getattr(own, "image_grid_pinpoints", None) or []:
        sizes += [int(x) for x in point]
    return max(sizes, default=1024)
