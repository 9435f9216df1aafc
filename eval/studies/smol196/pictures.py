"""The pictures of the study, as specifications that any machine renders alike: singles, collages, printed words.

A collage is 1 to 6 photographs at random places and sizes on a canvas of 448 pixels, apart from each other and
on no grid. Words are printed on a photograph that fills the canvas.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE = 448
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass
class Part:
    """A photograph in a collage: its name and the box (left, top, right, bottom) it fills."""

    photo: str
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        """One of nine: "top left", "top", …, "centre", …, "bottom right", by where its middle lies."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        row, column = ROWS[min(int(3 * y / SIDE), 2)], COLUMNS[min(int(3 * x / SIDE), 2)]
        return " ".join(filter(None, (row, column))) or "centre"


@dataclass
class Picture:
    """What is to be drawn. `words`: (text, x, y of its top left, height) in reading order from the top."""

    kind: str  # "single", "collage" or "words"
    parts: list[Part]
    words: list[tuple[str, int, int, int]] = field(default_factory=list)
    colour: tuple[int, int, int] = (128, 128, 128)

    def to_list(self) -> list[Any]:
        parts = [[p.photo, *p.box] for p in self.parts]
        return [self.kind, parts, [list(w) for w in self.words], list(self.colour)]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Picture:
        kind, parts, words, colour = values
        return cls(kind, [Part(p[0], tuple(p[1:])) for p in parts], [tuple(w) for w in words], tuple(colour))


def single(photo: str) -> Picture:
    return Picture("single", [Part(photo, (0, 0, SIDE, SIDE))])


def collage(photos: Sequence[str], rng: random.Random) -> Picture:
    """The photographs at random, apart from each other; sides of 112 to 208 pixels, less where they do not fit."""
    most = 208
    while True:
        parts: list[Part] = []
        for photo in photos:
            for _ in range(60):
                width = rng.randint(min(112, most - 8), most)
                height = min(max(int(width * rng.uniform(0.8, 1.25)), 80), most)
                left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
                box = (left, top, left + width, top + height)
                if all(_apart(box, other.box) for other in parts):
                    parts.append(Part(photo, box))
                    break
        if len(parts) == len(photos):
            return Picture("collage", parts, colour=tuple(rng.randint(0, 255) for _ in range(3)))
        most = max(most - 8, 96)


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def printed(photo: str, words: Sequence[str], rng: random.Random) -> Picture:
    """The words, from the top, at random places of a photograph; no two on one line."""
    picture = single(photo)
    picture.kind = "words"
    room = SIDE // len(words)
    for i, word in enumerate(words):
        height = rng.randint(52, 76)
        width = int(word_font(height).getlength(word.upper())) + 8
        top = i * room + rng.randint(0, max(room - height - 8, 0))
        picture.words.append((word, rng.randint(0, max(SIDE - width, 0)), top, height))
    return picture


_FONTS: dict[int, Any] = {}


def word_font(height: int) -> Any:
    if height not in _FONTS:
        _FONTS[height] = ImageFont.load_default(height)
    return _FONTS[height]


def render(picture: Picture, photo: Callable[[str], Image.Image]) -> Image.Image:
    """The picture in RGB, 448 × 448. `photo` opens one by its name."""
    canvas = Image.new("RGB", (SIDE, SIDE), picture.colour)
    for part in picture.parts:
        left, top, right, bottom = part.box
        canvas.paste(photo(part.photo).resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    draw = ImageDraw.Draw(canvas)
    for word, left, top, height in picture.words:
        font = word_font(height)
        draw.rectangle((left, top, left + int(font.getlength(word.upper())) + 8, top + height + 8), fill="white")
        draw.text((left + 4, top), word.upper(), font=font, fill="black")
    return canvas
