"""Pictures from disk: every promise of images.py."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from data_fixtures import TWO_ROUNDS
from PIL import Image

from llava_fwd2bot.processing.images import ImageError, open_image


def png(size=(40, 30), **kwargs) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, **{"format": "PNG", **kwargs})
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.png: no such file; check the name"),
        (b"", r"x.png: the file is empty \(0 bytes\); download"),
        (b"<html>404</html>", "x.png: not a picture that Pillow can read; remove it or convert"),
        (png()[:-900], "x.png: damaged or truncated .*download or copy it again"),
        (png(format="JPEG")[:-300], "x.png: damaged or truncated"),
        (png()[:40], "x.png: (damaged or truncated|not a picture)"),
    ],
)
def test_bad_pictures(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        open_image(tmp_path / "x.png")


def test_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageError, match="is a folder, not a picture"):
        open_image(tmp_path)


# 20,000 x 20,000 in a file of 50 kB: it must be refused from its header, before 1.2 GB are allocated, and Pillow's own
# warnings and errors at other limits must not come first.
def test_huge_picture_is_refused_by_its_header(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ImageError, match="20000x20000 = 400,000,000 pixels, over the limit of 178,956,970.*max_pixels"
        ):
            open_image(tmp_path / "x.png")
        Image.new("1", (10_000, 10_000)).save(tmp_path / "y.png")  # Pillow warns here, below our limit
        assert open_image(tmp_path / "y.png").size == (10_000, 10_000)
        (tmp_path / "z.png").write_bytes(png((40, 30)))
        with pytest.raises(ImageError, match="40x30 = 1,200 pixels, over the limit of 1,199"):
            open_image(tmp_path / "z.png", max_pixels=1199)
        assert open_image(tmp_path / "z.png", max_pixels=1200).size == (40, 30)


# A limit above Pillow's own has to work too: that is what the option is for.
def test_limit_can_be_raised_above_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "x.png").write_bytes(png((40, 30)))
    assert open_image(tmp_path / "x.png").size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100  # other code's protection stays as it was


def test_modes_become_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    for name, image, options in (
        ("p.png", palette, {"transparency": b"\x00\x80"}),  # Pillow warns about this kind in a direct convert
        ("rgba.png", red.convert("RGBA"), {}),
        ("cmyk.jpg", red.convert("CMYK"), {"quality": 100}),
        ("anim.gif", red, {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (0, 255, 0))]}),  # first frame
    ):
        image.save(tmp_path / name, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_image(tmp_path / name)
        r, g, b = opened.getpixel((4, 4))
        assert opened.mode == "RGB" and r > 240 and g < 15 and b < 15, name


# A plain convert("RGB") turns 16-bit greys above 255 white: scans and depth maps would be blank.
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16)).save(tmp_path / f"x.{suffix}")
    assert open_image(tmp_path / f"x.{suffix}").getpixel((0, 0)) == (128, 128, 128)


# LLaVA ignores EXIF orientation; turning here would differ from what the base model saw in training.
def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (20, 10)


# Thin pictures look like channels-first arrays to a careless processor; their colours must survive.
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (50, 1), (1, 50), (50, 3)])
def test_tiny_pictures_are_fine(make, folder, size):
    Image.new("RGB", size, (255, 0, 0)).save(folder / "tiny.png")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(folder / "red.png")
    tiny, red = make([{"image": name, "conversations": TWO_ROUNDS} for name in ("tiny.png", "red.png")])
    assert torch.equal(tiny["pixel_values"], red["pixel_values"]) and torch.equal(tiny["input_ids"], red["input_ids"])


# A missing file is known only at access, so the message must lead back to record, path and option.
def test_bad_picture_names_record_and_folder(make, folder):
    dataset = make([{"id": "abc", "image": "gone.png", "conversations": TWO_ROUNDS}])
    with pytest.raises(
        ImageError, match=r'record 0 \(id "abc"\): .*gone.png: no such file.*--image_folder is '
    ) as info:
        dataset[0]
    assert str(folder) in str(info.value)
    with pytest.raises(ImageError, match="40x60 = 2,400 pixels, over the limit of 100"):
        make([{"image": "a.png", "conversations": TWO_ROUNDS}], max_pixels=100)[0]
