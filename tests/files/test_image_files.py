"""A picture's file: which are opened, how large they may become, which way up they are, and what an error says."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from llava_fwd2bot.files.images import MAX_PREPARED, ImageError, open_image, read_image
from llava_fwd2bot.files.pixels import OWN, Reading
from llava_fwd2bot.files.regular import file_digest
from llava_fwd2bot.processing.images import prepare_pixels, prepared_size, processor_digest

COLOUR = (9, 99, 9)


def corner(size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Black, with a white upper left quarter: it tells which way up it lies."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_turns_people_s_own_pictures(tmp_path, orientation, suffix):
    """Photographs of telephones lie on their side in the file; the model would be asked about a fallen scene."""
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # Image.Transpose that lays it as the file has it
    stored = corner() if undo is None else corner().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif)
    upright = np.asarray(open_image(tmp_path / f"x.{suffix}", reading=OWN)).astype(int)
    assert upright.shape == (16, 24, 3) and np.abs(upright - np.asarray(corner())).mean() < 8
    as_it_lies = np.asarray(open_image(tmp_path / f"x.{suffix}")).astype(int)
    assert as_it_lies.shape == np.asarray(stored).shape and np.abs(as_it_lies - np.asarray(stored)).mean() < 8


def test_damaged_exif_is_no_reason_to_refuse_sound_pixels(tmp_path):
    Image.new("RGB", (20, 10), COLOUR).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff\xff")
    assert open_image(tmp_path / "x.jpg", reading=OWN).size == (20, 10)


def transparent(kind: str) -> tuple[Image.Image, dict]:
    """A picture that is transparent all over, with red hidden under it."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    if kind == "RGBA":
        return Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}
    if kind == "LA":
        return Image.new("LA", (8, 8), (40, 0)), {}
    if kind == "P":
        return red.quantize(2), {"transparency": red.quantize(2).getpixel((0, 0))}
    if kind == "L":
        return Image.new("L", (8, 8), 40), {"transparency": 40}
    if kind == "I;16":
        return Image.fromarray(np.full((8, 8), 40 * 256, np.uint16)), {"transparency": 40 * 256}
    return red, {"transparency": (255, 0, 0)}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "I;16", "RGB"])
def test_transparency_becomes_white(tmp_path, kind):
    """A logo with a clear background came out in whatever colours its file hides there, often black."""
    image, options = transparent(kind)
    image.save(tmp_path / "x.png", **options)
    assert open_image(tmp_path / "x.png", reading=OWN).getpixel((4, 4)) == (255, 255, 255)
    hidden = open_image(tmp_path / "x.png").getpixel((4, 4))
    assert hidden in ((255, 0, 0), (254, 0, 0), (40, 40, 40))  # as LLaVA reads it


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "x.webp", lossless=True)
    r, g, b = open_image(tmp_path / "x.webp", reading=Reading(on_white=True)).getpixel((4, 4))
    assert r == g == b and 120 <= r <= 135


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"GRIB\0\0\0\1", "GRIB"),
        (b"8BPS\0\1", "PSD"),
    ],
)
def test_formats_that_are_no_pictures_are_not_opened(tmp_path, head, named, monkeypatch):
    """Pillow goes by the content: a PostScript file called .jpg starts Ghostscript."""
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *args, **more: pytest.fail("a program was started"))
    (tmp_path / "x.jpg").write_bytes(head + b"\0" * 500)
    with pytest.raises(
        ImageError, match=f"x.jpg: not a picture that Pillow can read here, but one of the format {named}"
    ):
        open_image(tmp_path / "x.jpg")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    """Opening a pipe that nobody writes to never comes back, and Ctrl-C does not end it."""
    os.mkfifo(tmp_path / "x.jpg")
    found = []

    def attempt() -> None:
        for read in (open_image, file_digest):
            try:
                read(tmp_path / "x.jpg")
            except (ImageError, OSError) as error:
                found.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and len(found) == 2 and all("named pipe" in told for told in found)
    with pytest.raises(ImageError, match="is a device"):
        open_image("/dev/zero")


def png_with(kind: str, size: int) -> dict:
    if kind == "icc":
        return {"icc_profile": b"\0" * size}
    info = PngImagePlugin.PngInfo()
    if kind == "ztxt":
        info.add_text("parameters", "x" * size, zip=True)
    elif kind == "itxt":
        info.add_itxt("parameters", "x" * size, zip=True)
    else:
        info.add_text("parameters", "x" * size)
    return {"pnginfo": info}


@pytest.mark.parametrize("kind", ["icc", "ztxt", "itxt", "text"])
def test_large_metadata_of_a_png(tmp_path, kind):
    """Image generators and scanners write megabytes beside sound pixels; Pillow's own limit is 1 MB."""
    Image.new("RGB", (64, 48), COLOUR).save(tmp_path / "x.png", **png_with(kind, 3 << 20))
    before = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    with ThreadPoolExecutor(8) as pool:
        assert {i.getpixel((0, 0)) for i in pool.map(open_image, [tmp_path / "x.png"] * 24)} == {COLOUR}
    assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == before  # other code's stay


@pytest.mark.parametrize("kind", ["icc", "ztxt"])
def test_metadata_are_still_bounded(tmp_path, kind):
    """100 kB that unpack to 100 MB: refused, and by its own reason."""
    Image.new("RGB", (64, 48), COLOUR).save(tmp_path / "x.png", **png_with(kind, 100 << 20))
    with pytest.raises(ImageError, match="its metadata .* take more than 64 MB unpacked") as info:
        open_image(tmp_path / "x.png")
    assert "damaged" not in str(info.value)


def test_a_truncated_file_is_refused_whatever_other_libraries_set(tmp_path, monkeypatch):
    """lmms-eval has Pillow fill in what is missing, for the whole process: damaged pictures then trained in silence."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8")).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="damaged or truncated"):
        open_image(tmp_path / "x.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # other code's own stays


def test_what_is_no_damage_is_not_called_damage(tmp_path, monkeypatch):
    """Told to download the file again, people do so in vain."""
    Image.new("RGB", (64, 48), COLOUR).save(tmp_path / "x.png")
    for error, reason in (
        (MemoryError(), "not enough memory to decode 64x48 pixels"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
        (OSError("decoder jpeg2k not available"), "this Pillow has no decoder jpeg2k"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PngImagePlugin.PngImageFile, "load", lambda self, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(ImageError, match=reason) as info:
                open_image(tmp_path / "x.png")
            assert "damaged" not in str(info.value)
    with pytest.raises(ImageError, match="cannot be read .*null"):
        open_image("a\0b.png")
    with pytest.raises(ImageError, match="File name too long"):
        open_image(tmp_path / ("x" * 300))


def test_the_digest_is_of_the_bytes_that_were_decoded(tmp_path):
    Image.new("RGB", (8, 8), COLOUR).save(tmp_path / "x.png")
    image, digest = read_image(tmp_path / "x.png", digest=True)
    assert image.getpixel((0, 0)) == COLOUR and digest == file_digest(tmp_path / "x.png")


def hosts() -> dict:
    """Image processors of the hosts as their checkpoints have them, and what each makes of a thin picture."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    try:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
    except ImportError:  # in transformers 5.4 it needs torchvision, which the tests do without
        onevision = {}
    else:
        onevision = {"onevision": (SimpleNamespace(image_processor=LlavaOnevisionImageProcessorPil()), True)}
    square = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    clip, grid = CLIPImageProcessorPil(**square), {"image_grid_pinpoints": [[336, 672]]}
    original = {
        name: SimpleNamespace(clip_processor=clip, config=SimpleNamespace(image_aspect_ratio=name, **grid))
        for name in ("pad", "anyres", "square")
    }
    return {
        "crop": (SimpleNamespace(image_processor=clip), False),
        "pad": (SimpleNamespace(image_processor=LlavaImageProcessorPil(**square, do_pad=True)), False),
        "next": (SimpleNamespace(image_processor=LlavaNextImageProcessorPil(**square)), True),
        **onevision,
        "original pad": (original["pad"], False),
        "original anyres": (original["anyres"], True),
        "original crop": (original["square"], False),
    }


@pytest.mark.parametrize("host", list(hosts()))
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_thin_picture_is_bounded_as_the_host_resizes_it(tmp_path, host, size):
    """100 bytes of 1 x 3000 pixels take 3.6 GB in LLaVA-1.5's own preparation; NeXT's crops have their own size."""
    processor, fine = hosts()[host]
    Image.new("RGB", size, COLOUR).save(tmp_path / "x.png")
    if fine:
        assert open_image(tmp_path / "x.png", prepared=prepared_size(processor)).size == size
        return
    with pytest.raises(ImageError, match="x.png: .* becomes .* pixels when the model's image processor"):
        open_image(tmp_path / "x.png", prepared=prepared_size(processor))
    if hasattr(processor, "image_processor"):
        with pytest.raises(ImageError, match="becomes"):
            prepare_pixels(processor, SimpleNamespace(image_input_names=()), [Image.new("RGB", size)])


@pytest.mark.parametrize("host", list(hosts()))
@pytest.mark.parametrize("size", [(1, 1), (4000, 3000), (13_000, 10_000), (1080, 50_000), (50, 1)])
def test_pictures_that_people_have_are_within_the_bound(host, size):
    """Large photographs and long screenshots: what they become is no more than a few times themselves."""
    becomes = prepared_size(hosts()[host][0])(size)
    if (host, size) not in {("pad", (1080, 50_000)), ("original pad", (1080, 50_000))}:  # 2.5 billion pixels, padded
        assert becomes <= max(MAX_PREPARED, 4 * size[0] * size[1])


def test_what_is_computed_is_what_the_processor_makes(monkeypatch):
    """The bound is read off the settings; here the processors' own resize says what it makes."""
    for name in ("crop", "pad", "next", *({"onevision"} & hosts().keys())):
        processor = hosts()[name][0].image_processor
        largest = []
        resize = type(processor).resize

        def watched(self, image, *args, resize=resize, largest=largest, **more):
            out = resize(self, image, *args, **more)
            largest.append(max(image.shape[-1] * image.shape[-2], out.shape[-1] * out.shape[-2]))
            return out

        monkeypatch.setattr(type(processor), "resize", watched)
        processor(images=[Image.new("RGB", (20, 200))], return_tensors="pt")
        computed = prepared_size(hosts()[name][0])((20, 200))
        assert computed == max(largest) if name in ("crop", "pad") else computed == 0 and max(largest) < MAX_PREPARED


def test_another_processor_has_another_digest(processor):
    """What is kept by a run is not taken where pictures or prompts are prepared otherwise."""
    import copy

    one = processor_digest(processor)
    processor.tokenizer(["a", "b c"], padding=True)  # leaves its settings in the tokenizer
    assert processor_digest(processor) == one
    other = copy.deepcopy(processor)
    other.image_processor.do_normalize = not other.image_processor.do_normalize
    assert processor_digest(other) != one
    other = copy.deepcopy(processor)
    other.chat_template = (other.chat_template or "") + " "
    assert processor_digest(other) != one
