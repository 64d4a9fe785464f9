"""Read a picture of the demo model back into words, and score a model by it.

    python -m workers.demo.judge MODEL_DIR --n 384 --sheet sheet.png

Colours are read from pixels. The shape is read by its geometry: for each of the eight, the ideal
outline with the area and the centre of gravity of what was drawn is laid over it, and the best
overlap wins if it is good enough. numpy and pillow only; a model is rendered by diffusers, which
is imported when it is needed.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from workers.demo.shapes import (
    COLOURS,
    PLACES,
    RES,
    SHAPES,
    SIZES,
    Bytes,
    Floats,
    Scene,
    coverage,
    held_out,
    nominal_rgb,
    triples,
)

STEPS = 6
GUIDANCE = 2.0
"""The settings that the model card recommends."""

UNREAD = "?"
"""Stands where a picture shows nothing that has a word."""
COLOUR_REACH = 0.2
"""Largest RGB distance (0..1 a channel) between a pixel and the colour whose name it gets."""
PURITY = 0.75
"""Least part of an area's pixels that must carry the name that the area gets."""
LEAST_FIT = 0.8
"""Least overlap (intersection over union) with an ideal outline that names a shape."""
LEAST_EXTENT = 0.6
"""Least overlap that still gives a size and a place, the shape being unclear."""
PLACE_REACH = 0.17
"""Largest distance from a nominal centre, in half picture widths."""
SIZE_BOUNDS = (
    math.sqrt(SIZES["small"] * SIZES[""]),
    math.sqrt(SIZES[""] * SIZES["large"]),
)
"""Radii that part small from middle from large."""
_NAMES = tuple(COLOURS)
_RGB = np.stack([nominal_rgb(name) for name in _NAMES])


@dataclass(frozen=True)
class Reading:
    """What a picture shows, in the words of a `Scene` or `UNREAD`.

    `fit` is the overlap of the shape with its ideal outline, 0..1; `radius` and `centre` are in
    half picture widths.
    """

    colour: str
    shape: str
    background: str
    size: str = UNREAD
    place: str = UNREAD
    fit: float = 0.0
    radius: float = 0.0
    centre: tuple[float, float] = (0.0, 0.0)

    def shows(self, scene: Scene) -> bool:
        """Whether colour, shape and background are the scene's."""
        mine = (self.colour, self.shape, self.background)
        return mine == (scene.colour, scene.shape, scene.background)


def _name(pixels: Floats) -> str:
    """The one colour word of the pixels (n, 3), if enough of them carry it."""
    if not len(pixels):
        return UNREAD
    distance = np.sqrt(((pixels[:, None] - _RGB) ** 2).sum(-1))
    nearest = np.where(distance.min(1) <= COLOUR_REACH, distance.argmin(1), len(_NAMES))
    votes = np.bincount(nearest, minlength=len(_NAMES) + 1)
    best = int(votes[:-1].argmax())
    return _NAMES[best] if votes[best] >= PURITY * len(pixels) else UNREAD


def _background(picture: Floats) -> Floats:
    """The background of each row, (height, 1, 3): a line along y through the frame's pixels."""
    height, width = picture.shape[:2]
    frame = np.ones((height, width), bool)
    frame[3:-3, 3:-3] = False
    rows = np.where(frame)[0]
    pixels = picture[frame]
    near = np.abs(pixels - np.median(pixels, 0)).max(1) < 0.12
    if near.sum() < 0.3 * len(pixels):
        near[:] = True
    slope, level = np.polyfit(rows[near], pixels[near], 1)
    line = level + slope * np.arange(height)[:, None]
    return np.asarray(line[:, None], np.float32)


@cache
def _ideal(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1 and how far its centre of gravity lies below its centre."""
    res, radius = 256, 0.6
    mask = coverage(shape, radius, res=res)
    line = (np.arange(res) + 0.5) / res * 2 - 1
    area = float(mask.sum())
    lower = float((mask.sum(1) * line).sum()) / area
    return area * (2 / res) ** 2 / radius**2, lower / radius


def _fit(cover: Floats, shape: str) -> tuple[float, float, tuple[float, float]]:
    """Overlap, radius and centre of the ideal outline that matches a coverage (res, res)."""
    res = len(cover)
    line = (np.arange(res) + 0.5) / res * 2 - 1
    total = float(cover.sum())
    area, lower = _ideal(shape)
    radius = math.sqrt(total * (2 / res) ** 2 / area)
    x = float((cover.sum(0) * line).sum()) / total
    y = float((cover.sum(1) * line).sum()) / total - lower * radius
    ideal = coverage(shape, radius, (x, y), res)
    overlap = float(np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum())
    return overlap, radius, (x, y)


def _place(centre: tuple[float, float]) -> str:
    """The place word whose nominal centre is near enough."""
    away = {word: math.dist(centre, nominal) for word, nominal in PLACES.items()}
    word = min(away, key=lambda w: away[w])
    return word if away[word] <= PLACE_REACH else UNREAD


def _size(radius: float) -> str:
    """The size word of a radius."""
    return ("small", "", "large")[sum(radius > bound for bound in SIZE_BOUNDS)]


def read(picture: Bytes) -> Reading:
    """Read an 8-bit picture (side, side, 3)."""
    x = picture.astype(np.float32) / 255
    ground = _background(x)
    away = np.sqrt(((x - ground) ** 2).sum(-1))
    contrast = float(np.quantile(away, 0.99))
    background = _name(x[away < 0.3 * max(contrast, 0.1)])
    if contrast < 0.12:
        return Reading(UNREAD, UNREAD, background)
    inner = away > 0.8 * contrast
    colour = _name(x[inner])
    paint = np.median(x[inner], 0) - np.median(ground, 0)[0]
    cover = np.clip((x - ground) @ paint / float(paint @ paint), 0, 1)
    cover = np.where(away < 0.3 * contrast, 0, cover).astype(np.float32)
    fits = {shape: _fit(cover, shape) for shape in SHAPES}
    shape = max(fits, key=lambda s: fits[s][0])
    fit, radius, centre = fits[shape]
    if fit < LEAST_EXTENT:
        return Reading(colour, UNREAD, background, fit=fit)
    size, place = _size(radius), _place(centre)
    named = shape if fit >= LEAST_FIT else UNREAD
    return Reading(colour, named, background, size, place, fit, radius, centre)


# -------------------------------------------------------------- exam of a model
def exam(count: int, seed: int = 7, *, words: bool = False) -> list[Scene]:
    """Scenes to ask a model for: first every triple kept out of training, then others.

    With `words`, every scene also names a size, a place or both.
    """
    rng = random.Random(seed)
    kept = [t for t in triples() if held_out(*t)]
    seen = [t for t in triples() if not held_out(*t)]
    rng.shuffle(kept)
    rng.shuffle(seen)
    pairs = [(s, p) for s in SIZES for p in PLACES if (s or p) or not words]
    scenes = []
    for number, (colour, shape, background) in enumerate((kept + seen)[:count]):
        size, place = pairs[number % len(pairs)] if words else ("", "")
        scenes.append(Scene(colour, shape, background, size, place))
    return scenes


def render(
    folder: Path,
    prompts: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 16,
    seed: int = 1000,
) -> list[Bytes]:
    """One picture of each prompt, picture i with seed `seed + i`, by the model in the folder."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Bytes] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        noise = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(some))]
        out = pipeline(
            prompt=some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
            output_type="np",
        )
        pictures.extend(np.round(out.images * 255).astype(np.uint8))
    return pictures


@dataclass(frozen=True)
class Score:
    """How many of `count` pictures are right in each respect; `all_three` leaves size and place."""

    count: int
    colour: int
    shape: int
    background: int
    all_three: int
    size: int
    place: int
    fit: float

    def __str__(self) -> str:
        """One line: the picture count and the percentages."""
        parts = ("all_three", "colour", "shape", "background", "size", "place")
        figures = (f"{p.replace('_', ' ')} {getattr(self, p) / self.count:.2%}" for p in parts)
        return f"{self.count} pictures: {', '.join(figures)}; mean overlap {self.fit:.3f}"


def score(scenes: Sequence[Scene], readings: Sequence[Reading]) -> Score:
    """Compare what was asked for with what was read."""
    pairs = list(zip(scenes, readings, strict=True))
    right = {
        part: sum(getattr(s, part) == getattr(r, part) for s, r in pairs)
        for part in ("colour", "shape", "background", "size", "place")
    }
    fit = float(np.mean([r.fit for r in readings]))
    return Score(len(pairs), all_three=sum(r.shows(s) for s, r in pairs), fit=fit, **right)


def sheet(pictures: Sequence[Bytes], columns: int = 12, scale: int = 2) -> Image.Image:
    """Pictures side by side, row by row."""
    rows = math.ceil(len(pictures) / columns)
    canvas = np.zeros((rows * RES, columns * RES, 3), np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * RES, number % columns * RES
        canvas[top : top + RES, left : left + RES] = picture
    size = (canvas.shape[1] * scale, canvas.shape[0] * scale)
    return Image.fromarray(canvas).resize(size, Image.Resampling.NEAREST)


def _report(title: str, scenes: Sequence[Scene], readings: Sequence[Reading]) -> None:
    """Print the score of one part of an exam and the first few that went wrong in it."""
    if not scenes:
        return
    print(f"{title}: {score(scenes, readings)}")
    shown = 0
    for scene, reading in zip(scenes, readings, strict=True):
        whole = reading.shows(scene) and (reading.size, reading.place) == (scene.size, scene.place)
        if not whole and (shown := shown + 1) <= 12:
            saw = f"{reading.size} {reading.colour} {reading.shape} on {reading.background}"
            print(f"  {scene.prompt()!r}: {saw} {reading.place}, overlap {reading.fit:.2f}")


def _options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a demo model.")
    parser.add_argument("model", type=Path, help="a StableDiffusionPipeline directory")
    parser.add_argument("--n", type=int, default=384, help="plain prompts, held-out triples first")
    parser.add_argument("--words", type=int, default=140, help="prompts with size or place words")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write the first 96 pictures here as PNG")
    return parser.parse_args()


def main() -> None:
    """Render an exam with a model and print how it did."""
    import torch

    args = _options()
    torch.set_num_threads(args.threads)
    scenes = exam(args.n) + exam(args.words, seed=8, words=True)
    prompts = [scene.prompt() for scene in scenes]
    settings = {k: getattr(args, k) for k in ("steps", "guidance", "batch", "seed")}
    start = time.process_time()
    pictures = render(args.model, prompts, **settings)
    spent = (time.process_time() - start) / len(scenes)
    readings = [read(picture) for picture in pictures]
    print(f"{settings}: {spent:.3f} CPU s a picture")
    parts: dict[str, list[int]] = {"held out": [], "seen": [], "size and place": []}
    for row, scene in enumerate(scenes):
        kept = held_out(scene.colour, scene.shape, scene.background)
        worded = scene.size or scene.place
        parts["size and place" if worded else "held out" if kept else "seen"].append(row)
    for title, rows in parts.items():
        _report(title, [scenes[i] for i in rows], [readings[i] for i in rows])
    if args.sheet:
        sheet(pictures[:96]).save(args.sheet)


if __name__ == "__main__":
    main()
