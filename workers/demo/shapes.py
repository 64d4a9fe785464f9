"""The world of the demo model: its words, its pictures, and what is kept out of training.

A picture shows one coloured shape on a coloured background. Lengths are in half picture widths
(the picture spans -1..1 on both axes, y points down), colours are RGB in 0..1, pictures are float32
arrays of shape (height, width, 3). numpy only.
"""

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]

RES = 64
"""Side of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "orange": (245, 140, 30),
    "purple": (130, 50, 170),
    "pink": (245, 150, 190),
    "cyan": (50, 205, 215),
    "brown": (125, 78, 40),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
}
"""Colour words and their RGB in 0..255."""

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart")
SIZES: dict[str, float] = {"small": 0.29, "": 0.43, "large": 0.59}
"""Size words and the nominal radius they stand for; the empty word is the middle size."""

PLACES: dict[str, tuple[float, float]] = {
    "": (0.0, 0.0),
    "left": (-0.38, 0.0),
    "right": (0.38, 0.0),
    "top": (0.0, -0.38),
    "bottom": (0.0, 0.38),
}
"""Place words and the nominal centre (x, y) they stand for; the empty word is the middle."""

PLACE_TEXT = {
    "": "",
    "left": " on the left",
    "right": " on the right",
    "top": " at the top",
    "bottom": " at the bottom",
}

PLAIN = "a {size}{colour} {shape} on a {background} background{place}"
TEMPLATES: tuple[tuple[str, int], ...] = (
    (PLAIN, 10),
    ("a {size}{colour} {shape}{place} on a {background} background", 3),
    ("{size}{colour} {shape}, {background} background{place}", 2),
    ("{size}{colour} {shape} on {background}{place}", 2),
    ("a picture of a {size}{colour} {shape} on a {background} background{place}", 2),
    ("{background} background with a {size}{colour} {shape}{place}", 2),
)
"""Caption templates and their weights in the training set."""

_FILLER = ("a", "on", "at", "the", "of", "with", "background", "picture")
WORDS = (
    tuple(COLOURS) + SHAPES + tuple(w for w in SIZES if w) + tuple(w for w in PLACES if w) + _FILLER
)
"""Every word that the captions use; each is one token of the model's tokenizer."""

ALIASES = {"an": "a", "grey": "gray", "big": "large", "little": "small"}
"""Words that no caption uses; the finished model takes each for the word it stands for."""

SIZE_JITTER = 0.06
"""Largest relative deviation of a radius from its nominal value."""
PLACE_JITTER = 0.06
"""Largest deviation of a centre from its nominal value, per axis."""
COLOUR_JITTER = 0.015
"""Standard deviation of a colour channel around its nominal value."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in words; an empty size or place is the middle one, unsaid."""

    colour: str
    shape: str
    background: str
    size: str = ""
    place: str = ""

    def prompt(self, template: str = PLAIN) -> str:
        """The scene as a caption."""
        return template.format(
            size=f"{self.size} " if self.size else "",
            colour=self.colour,
            shape=self.shape,
            background=self.background,
            place=PLACE_TEXT[self.place],
        )


def held_out(colour: str, shape: str, background: str) -> bool:
    """Whether the triple is kept out of training, in every size and place.

    The rule: CRC-32 of "colour shape background" is divisible by ten.
    """
    return zlib.crc32(f"{colour} {shape} {background}".encode()) % 10 == 0


def triples() -> list[tuple[str, str, str]]:
    """All 1,056 (colour, shape, background) in which shape and background differ in colour."""
    return [(c, s, b) for c in COLOURS for s in SHAPES for b in COLOURS if c != b]


# ------------------------------------------------------------------ outlines
# Each is a distance to the outline of a shape of radius r around the origin: negative inside,
# exact near straight edges and smooth enough elsewhere to antialias by. (height, width) arrays.


def _circle(x: Floats, y: Floats, r: float) -> Floats:
    return np.hypot(x, y) - r


def _square(x: Floats, y: Floats, r: float) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r


def _triangle(x: Floats, y: Floats, r: float) -> Floats:
    """Pointing up; as wide as 1.93 r."""
    side = np.abs(x) * math.sqrt(0.75) - 0.5 * (y + 1.05 * r)
    triangle: Floats = np.maximum(side, y - 0.62 * r)
    return triangle


def _diamond(x: Floats, y: Floats, r: float) -> Floats:
    """Taller than wide, to be told from a turned square."""
    return (1.25 * np.abs(x) + np.abs(y)) / 1.6 - 0.68 * r


def _ring(x: Floats, y: Floats, r: float) -> Floats:
    return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r


def _cross(x: Floats, y: Floats, r: float) -> Floats:
    u, v = np.abs(x), np.abs(y)
    upright = np.maximum(u - 0.3 * r, v - 0.98 * r)
    level = np.maximum(u - 0.98 * r, v - 0.3 * r)
    return np.minimum(upright, level)


def _star(x: Floats, y: Floats, r: float) -> Floats:
    """Five points, one up; each half point is one straight edge from tip to notch."""
    fifth = 2 * math.pi / 5
    turn = np.arctan2(x, -y)
    angle = np.abs((turn + fifth / 2) % fifth - fifth / 2)
    rho = np.hypot(x, y)
    tip, notch = 1.08 * r, 0.46 * r
    ex, ey = notch * math.cos(fifth / 2) - tip, notch * math.sin(fifth / 2)
    along = (rho * np.cos(angle) - tip) * ey - rho * np.sin(angle) * ex
    return np.asarray(along / math.hypot(ex, ey), np.float32)


def _heart(x: Floats, y: Floats, r: float) -> Floats:
    """A square on its corner and two discs on its upper sides."""
    d = 0.8 * r
    u, v = np.abs(x), y - 0.14 * r
    corner = (u + np.abs(v) - d) * math.sqrt(0.5)
    disc = np.hypot(u - d / 2, v + d / 2) - d * math.sqrt(0.5)
    heart: Floats = np.minimum(corner, disc)
    return heart


_OUTLINES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
}


def _grid(centre: tuple[float, float], res: int) -> tuple[Floats, Floats]:
    """Positions x and y of every pixel's middle, seen from the centre; two (res, res) arrays."""
    line = (np.arange(res, dtype=np.float32) + 0.5) / res * 2 - 1
    x, y = np.meshgrid(line - np.float32(centre[0]), line - np.float32(centre[1]))
    return x, y


def coverage(
    shape: str, radius: float, centre: tuple[float, float] = (0.0, 0.0), res: int = RES
) -> Floats:
    """How much of each pixel the shape covers, 0..1, (res, res)."""
    x, y = _grid(centre, res)
    distance = _OUTLINES[shape](x, y, radius)
    cover: Floats = np.clip(0.5 - distance * (res / 2.6), 0, 1).astype(np.float32)
    return cover


def draw(
    shape: str,
    colour: Floats,
    background: Floats,
    radius: float,
    centre: tuple[float, float] = (0.0, 0.0),
    res: int = RES,
) -> Floats:
    """One picture, (res, res, 3) in 0..1; both colours fade softly from top to bottom."""
    cover = coverage(shape, radius, centre, res)[..., None]
    _, y = _grid((0.0, 0.0), res)
    fade = -0.05 * y[..., None]
    below = np.clip(background + fade, 0, 1)
    above = np.clip(colour + fade, 0, 1)
    return (below * (1 - cover) + above * cover).astype(np.float32)


def nominal_rgb(name: str) -> Floats:
    """A colour word as RGB in 0..1, (3,)."""
    return np.array(COLOURS[name], np.float32) / 255


def draw_scene(scene: Scene, rng: random.Random) -> Bytes:
    """The scene as an 8-bit picture (RES, RES, 3), with small deviations that `rng` gives."""

    def shade(name: str) -> Floats:
        noise = np.array([rng.gauss(0, COLOUR_JITTER) for _ in range(3)], np.float32)
        rgb: Floats = np.clip(nominal_rgb(name) + noise, 0, 1).astype(np.float32)
        return rgb

    radius = SIZES[scene.size] * (1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER))
    x, y = (v + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for v in PLACES[scene.place])
    picture = draw(scene.shape, shade(scene.colour), shade(scene.background), radius, (x, y))
    return np.round(picture * 255).astype(np.uint8)


def training_scene(rng: random.Random) -> tuple[Scene, str]:
    """Choose a scene of the training set and its caption; never a held-out triple."""
    while True:
        shape = rng.choice(SHAPES)
        colour, background = rng.sample(list(COLOURS), 2)
        if not held_out(colour, shape, background):
            break
    size = rng.choices(list(SIZES), weights=(2, 6, 2))[0]
    place = rng.choices(list(PLACES), weights=(6, 1, 1, 1, 1))[0]
    scene = Scene(colour, shape, background, size, place)
    names, weights = zip(*TEMPLATES, strict=True)
    return scene, scene.prompt(rng.choices(names, weights=weights)[0])


def training_set(count: int, seed: int) -> tuple[Bytes, list[str]]:
    """`count` pictures, (count, RES, RES, 3) 8-bit, and their captions; equal for an equal seed."""
    rng = random.Random(seed)
    pictures = np.empty((count, RES, RES, 3), np.uint8)
    captions = []
    for row in range(count):
        scene, caption = training_scene(rng)
        pictures[row] = draw_scene(scene, rng)
        captions.append(caption)
    return pictures, captions
