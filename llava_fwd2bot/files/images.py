"""A picture's file, opened safely: regular files of known formats alone, bounded, and named in every error."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from .pixels import LLAVA, Reading, to_rgb
from .regular import open_regular

DEFAULT_MAX_PIXELS = 178_956_970  # where Pillow itself starts to refuse a picture
MAX_METADATA = 64 * 2**20  # bytes of a PNG's text or colour profile, unpacked; Pillow's own limit is 1 MB
MAX_PREPARED = 2**25  # pixels that the host's preparation may make of a small picture
MAX_GROWTH = 4  # times a picture's own pixels that it may make of a large one
# Of the formats that Pillow knows some run other programs (EPS: Ghostscript), some are no pictures (HDF5, GRIB), and
# some have no signature, so that anything may pass for them (TGA). AVIF and HEIF are there where a plugin reads them.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
# those of the others whose signature leaves no doubt, so that a message can name them
NAMED = ("EPS", "HDF5", "GRIB", "BUFR", "FITS", "PSD", "WMF", "ICO", "ICNS", "DDS", "MPEG", "QOI")


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and the remedy.

    Attributes:
        image: the picture's name where it is one of several, else None.
    """

    image: str | None = None


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads; HEIF (.heic) where pillow-heif is installed."""
    Image.init()
    if find_spec("pillow_heif") is not None:
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def extensions() -> set[str]:
    """The extensions of files that are looked at in a folder, with their dot, in lower case."""
    known = {*formats(), "MPO"}
    return {ext for ext, name in Image.registered_extensions().items() if name in known}


def open_image(
    path: str | os.PathLike,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    reading: Reading = LLAVA,
    prepared: Callable[[tuple[int, int]], int] | None = None,
) -> Image.Image:
    """Open one picture as RGB: the first frame of an animation and, like LLaVA, without turning it by EXIF.

    Palettes, alpha and CMYK go through `convert("RGB")` as in LLaVA. 16-bit grey is scaled to 8 bits, where a plain
    `convert` would clip it to white.

    Args:
        max_pixels: of the file; read from its header, before any decoding.
        reading: whether to turn it by EXIF, and what to do with transparency.
        prepared: gives the pixels that the host's preparation makes of a (width, height); see `check_prepared`.

    Raises:
        ImageError: the file is missing, empty, no regular file, not a picture of a known format, damaged, or too
            large, itself or prepared; the message gives the reason.
    """
    return read_image(path, max_pixels, reading, prepared)[0]


def read_image(
    path: str | os.PathLike,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    reading: Reading = LLAVA,
    prepared: Callable[[tuple[int, int]], int] | None = None,
    digest: bool = False,
) -> tuple[Image.Image, str | None]:
    """`open_image`'s picture, and the SHA-256 of the bytes that it was decoded from, or None without `digest`.

    The file is read once, so that the picture and its digest are of the same bytes.
    """
    given, path = str(path), Path(path)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError(f"{path}: the file is empty (0 bytes); download or copy it again")
            content = file.read() if digest else None
            picture = _decode(file if content is None else io.BytesIO(content), path, max_pixels, reading, prepared)
            return picture, None if content is None else hashlib.sha256(content).hexdigest()
    except (FileNotFoundError, NotADirectoryError) as error:
        if re.search(r"(^|/)(https?|ftp|s3|gs)://", given):
            raise ImageError(f"{given}: URLs are not fetched; download the picture and give the file") from error
        raise ImageError(f"{path}: no such file; check the name and the folder it is looked for in") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: is a folder, not a picture; name a file in it") from error
    except PermissionError as error:
        raise ImageError(f"{path}: permission denied; make the file readable") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def decode_image(
    data: bytes,
    name: str,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    reading: Reading = LLAVA,
    prepared: Callable[[tuple[int, int]], int] | None = None,
    look: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """`open_image` of the bytes of a file, which errors name `name`.

    Args:
        look: called with the opened picture before its pixels are decoded.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes); download or copy it again")
    return _decode(io.BytesIO(data), Path(name), max_pixels, reading, prepared, look)


def _decode(
    file: BinaryIO,
    path: Path,
    max_pixels: int,
    reading: Reading,
    prepared: Callable[[tuple[int, int]], int] | None,
    look: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    size = None
    try:
        with _pillow_settings(), _open_header(file) as image:
            size = image.size
            if size[0] * size[1] > max_pixels:
                raise ImageError(
                    f"{path}: {size[0]}x{size[1]} = {size[0] * size[1]:,} pixels, over the limit of {max_pixels:,}; "
                    "make the picture smaller, or raise max_pixels if you trust the file"
                )
            check_prepared(size, prepared or _by_shortest_edge, str(path))
            if look is not None:
                look(image)
            image.load()
            return to_rgb(image, reading)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        other = _other_format(file)
        reason = f"not a picture that Pillow can read{other}; remove it or convert it to JPEG/PNG"
        raise ImageError(f"{path}: {reason}") from error
    except MemoryError as error:
        shown = f" to decode {size[0]}x{size[1]} pixels" if size else ""
        raise ImageError(f"{path}: there is not enough memory{shown}; make the picture smaller") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files: OSError, SyntaxError, ...
        raise ImageError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What is wrong with a file at which Pillow raised `error`."""
    message = str(error)
    if "MAX_TEXT" in message:
        return (
            f"its metadata (text or colour profile) take more than {MAX_METADATA // 2**20} MB unpacked; "
            "save it again without them"
        )
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror})"
    if "not available" in message:
        return (
            f"this Pillow has no {message.removesuffix(' not available')}; install one that has, or convert the picture"
        )
    return f"damaged or truncated ({message}); download or copy it again"


def check_prepared(size: tuple[int, int], prepared: Callable[[tuple[int, int]], int], name: str) -> None:
    """Refuse a picture that becomes huge in the host's preparation: one that is thin grows as its shorter side does.

    Raises:
        ImageError: it becomes more than MAX_PREPARED pixels, and more than MAX_GROWTH times its own.
    """
    becomes, most = prepared(size), max(MAX_PREPARED, MAX_GROWTH * size[0] * size[1])
    if becomes > most:
        raise ImageError(
            f"{name}: {size[0]}x{size[1]} becomes {becomes:,} pixels when the model's image processor resizes or pads "
            f"it, over the limit of {most:,}; crop it, or pad its shorter side"
        )


def _by_shortest_edge(size: tuple[int, int]) -> int:
    # where no host is known: LLaVA-1.5's own preparation
    return 336 * max(336, -(-336 * max(size) // max(1, min(size))))


_limits = threading.Lock()
_reading = 0  # pictures that are being read: the first changes Pillow's settings, the last puts them back
_before: tuple[int, int, bool] = (0, 0, False)


@contextmanager
def _pillow_settings() -> Iterator[None]:
    # Pillow's limits of a PNG's text and colour profile are globals. Text may stand behind the pixels, so they are
    # raised until the picture is decoded; counted, so that several threads may decode at once. Whether a truncated
    # file passes for a picture is a global as well, which other libraries turn on (lmms-eval).
    global _reading, _before
    with _limits:
        if not _reading:
            truncated = ImageFile.LOAD_TRUNCATED_IMAGES
            _before = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, truncated)
            PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_METADATA, 2 * MAX_METADATA
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _reading += 1
    try:
        yield
    finally:
        with _limits:
            _reading -= 1
            if not _reading:
                PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = _before[:2]
                ImageFile.LOAD_TRUNCATED_IMAGES = _before[2]


_pillow_limit = threading.Lock()


def _open_header(file: BinaryIO) -> Image.Image:
    # Pillow's own limit is a global, known only by a pixel count, and stands in the way of a higher max_pixels.
    # It is lifted for the header alone, under a lock; the size is compared before anything is decoded.
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _other_format(file: BinaryIO) -> str:
    """How to name a file whose signature is that of a format that is not opened; else nothing."""
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    for name in NAMED:
        accept = Image.OPEN.get(name, (None, None))[1]
        if accept is not None and accept(head) is True:
            return f" here, but one of the format {name}, which is not opened"
    return ""
