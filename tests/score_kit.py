"""Plug-ins that score pictures."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image


class Sharpness:
    """The mean step from pixel to pixel."""

    def __init__(self, power: float = 1) -> None:
        self.power = power

    def score(self, image: Image.Image, prompt: str) -> float:
        assert image.mode == "RGB"
        grey = np.asarray(image.convert("L"), np.float32)
        return float(np.abs(np.diff(grey)).mean() ** self.power)


class Alone:
    """1 as long as it is asked by one thread at a time."""

    def __init__(self) -> None:
        self.inside = 0

    def score(self, image: Image.Image, prompt: str) -> float:
        self.inside += 1
        alone = self.inside == 1
        hashlib.sha256(bytes(2**22))  # lets go of Python's lock
        self.inside -= 1
        return float(alone)
