"""What the tests of the diffusers engine share: jobs, engines loaded once, input pictures."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farm.catalog import Weights
from farm.errors import JobCancelled
from farm.spec import JobSpec
from tests.models import tiny
from workers.engine import NO_INPUTS, EngineConfig, Inputs
from workers.engines.diffusers_engine import DiffusersEngine

# numpy 2 tells diffusers' schedulers, which turn tensors to arrays, of a protocol to come
QUIET = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
PROMPTS = ("a red cat", "the blue dog on a photo of the green cat", "green", "x y z")
FAMILIES = ("sd15", "sdxl", "sd3", "flux", "klein", "qwen_image", "z_image")
KINDS = ("image-to-image", "inpainting")
LONG = "the red cat on a photo of the green dog " * 10  # 100 tokens of CLIP
FLOAT32_TOLERANCE = 1e-4
"""Of the range 0 to 1, between sizes of micro-batches; half a step of 8 bits is 2e-3."""


class Steps:
    """A Watch that notes the steps and may cancel after one of them."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.seen: list[tuple[int, int]] = []
        self._cancel_after = cancel_after

    def step(self, done: int, total: int) -> None:
        self.seen.append((done, total))
        if done == self._cancel_after:
            raise JobCancelled


def spec(number: int = 0, **params: Any) -> JobSpec:
    plain = {
        "prompt": PROMPTS[number % 4],
        "negative_prompt": ("", "dog")[number % 2],
        "width": 64,
        "height": 64,
        "steps": 3,
        "guidance_scale": 4.0,
        "seed": number,
    }
    return JobSpec(model="tiny", **{**plain, **params})


def config(path: Path, **settings: Any) -> EngineConfig:
    return EngineConfig("diffusers", "tiny", Weights(path=path), threads=1, **settings)


@functools.cache
def engine(family: str) -> DiffusersEngine:
    made = DiffusersEngine(config(tiny(family)))
    made.load()
    return made


def floats(family: str, jobs: Sequence[JobSpec], inputs: Inputs = NO_INPUTS) -> torch.Tensor:
    return engine(family).render_floats(jobs, Steps(), inputs).images


# ------------------------------------------------------------------------- input pictures
def stored(pixels: np.ndarray[Any, Any]) -> tuple[str, bytes]:
    """An input picture as the blob store has it: key and PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    return f"inputs/{digest}.png", file.getvalue()


def noise(number: int, side: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)


def right_part(first: int, side: int = 64) -> np.ndarray[Any, Any]:
    """A mask that paints anew from the column `first` on."""
    mask = np.zeros((side, side), np.uint8)
    mask[:, first:] = 255
    return mask


PICTURES = [stored(noise(number)) for number in range(8)]
MASKS = [stored(right_part(16 + 4 * number)) for number in range(8)]
INPUTS: Inputs = dict([*PICTURES, *MASKS])


def of_kind(kind: str, number: int = 0, **params: Any) -> JobSpec:
    """A job of a kind with input pictures of its own."""
    ours: dict[str, Any] = {}
    if kind != "text-to-image":
        ours = {"init_image": PICTURES[number % 8][0], "strength": 0.7}
    if kind == "inpainting":
        ours["mask_image"] = MASKS[number % 8][0]
    return spec(number, **{**ours, **params})
