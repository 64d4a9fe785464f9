"""PNG files of our own, read by Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from farm.png import png

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (16, 24), (333, 67)])
def test_pillow_reads_the_same_pixels(width: int, height: int) -> None:
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    data = png(pixels.tobytes(), width, height, {})
    Image.open(io.BytesIO(data)).verify()  # every chunk's checksum
    assert (np.asarray(Image.open(io.BytesIO(data))) == pixels).all()


def test_texts_come_back_whole() -> None:
    texts = {"parameters": "赤い円 🟥\n, <b>bold</b>", "XML:com.adobe.xmp": "<x/>", "empty": ""}
    image = Image.open(io.BytesIO(png(bytes(48), 4, 4, texts)))
    image.load()
    assert image.info == texts | {"xmp": b"<x/>"}


def test_what_a_picture_has_little_of_takes_little() -> None:
    ramp = np.indices((256, 256)).sum(0).astype(np.uint8)
    raw = np.repeat(ramp[:, :, None], 3, axis=2).tobytes()
    assert len(png(raw, 256, 256, {})) < len(raw) / 20


@pytest.mark.parametrize("size", [47, 49])
def test_pixels_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="reshape"):
        png(bytes(size), 4, 4, {})
