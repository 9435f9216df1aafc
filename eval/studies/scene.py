"""A scene: objects on a grid of 3 × 3 places, what may be stated of them, and their picture."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE, CELL = 96, 32
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")
COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 180, 60),
    "blue": (50, 90, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "pink": (250, 140, 190),
    "white": (240, 240, 240),
    "grey": (140, 140, 140),
}
SIZES = {"small": 12, "large": 24}
GROUND = (25, 25, 35)
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """An object, or what is said of one: None is left open."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: int | None = None

    def fits(self, other: Thing) -> bool:
        """Whether `other`, an object, is as this says."""
        said = ((self.shape, other.shape), (self.colour, other.colour), (self.size, other.size))
        return all(mine is None or mine == theirs for mine, theirs in (*said, (self.place, other.place)))

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Statement:
    """A short caption: two objects, how the first lies to the second, and perhaps one more that is there."""

    first: Thing
    relation: str
    second: Thing
    more: Thing | None = None

    def true_of(self, scene: Scene) -> bool:
        pairs = ((a, b) for a in scene.things for b in scene.things if a is not b)
        held = any(self.first.fits(a) and self.second.fits(b) and lies(a, self.relation, b) for a, b in pairs)
        return held and (self.more is None or any(self.more.fits(thing) for thing in scene.things))

    def __str__(self) -> str:
        said = f"a {self.first} {self.relation} a {self.second}"
        return said if self.more is None else f"{said} and a {self.more}"


@dataclass(frozen=True)
class Scene:
    """One picture's objects, in the order of their places."""

    things: tuple[Thing, ...]

    def draw(self) -> Image.Image:
        image = Image.new("RGB", (SIDE, SIDE), GROUND)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            column, row = thing.place % 3, thing.place // 3
            _draw(pen, thing, CELL * column + CELL // 2, CELL * row + CELL // 2)
        return image

    def caption(self) -> str:
        """The long one: every object, by its place."""
        return ", ".join(f"a {thing} at the {PLACES[thing.place]}" for thing in self.things)


def lies(a: Thing, relation: str, b: Thing) -> bool:
    """Whether a is in a row or column further that way, whatever the other coordinate."""
    across, down = RELATIONS[relation]
    return (a.place % 3 - b.place % 3) * across > 0 or (a.place // 3 - b.place // 3) * down > 0


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, x: int, y: int) -> None:
    r, colour = SIZES[thing.size] // 2, COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    elif thing.shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour)
    elif thing.shape == "cross":
        third = max(1, r // 3)
        pen.rectangle((x - r, y - third, x + r, y + third), fill=colour)
        pen.rectangle((x - third, y - r, x + third, y + r), fill=colour)
    else:  # a star of four points
        half = max(1, r // 3)
        corners = [(0, -r), (half, -half), (r, 0), (half, half), (0, r), (-half, half), (-r, 0), (-half, -half)]
        pen.polygon([(x + dx, y + dy) for dx, dy in corners], fill=colour)
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
