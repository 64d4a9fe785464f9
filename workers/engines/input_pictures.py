"""A job's input pictures, as engines take them: decoded, and cut to the job's size.

A picture of another shape is scaled to cover the job's size, and what stands over is cut off on
both sides, so that nothing is distorted.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

from PIL import Image, ImageOps

from farm.errors import InvalidParameter
from farm.spec import INPUT_FORMATS, MAX_INPUT_PIXELS, JobSpec


def init_picture(job: JobSpec, inputs: Mapping[str, bytes]) -> Image.Image | None:
    """The init image, RGB, width x height of the job; None when it has none.

    Raises InvalidParameter when the file is missing or is no picture.
    """
    return _fitted(job, "init_image", job.init_image, inputs, "RGB")


def mask_picture(job: JobSpec, inputs: Mapping[str, bytes]) -> Image.Image | None:
    """The mask, "L" of 0 (kept) or 255 (painted anew), width x height of the job; None: no mask.

    Raises InvalidParameter when the file is missing or is no picture.
    """
    grey = _fitted(job, "mask_image", job.mask_image, inputs, "L")
    return grey.point(lambda value: 255 * (value >= 128)) if grey else None


def _fitted(
    job: JobSpec, field: str, key: str | None, inputs: Mapping[str, bytes], mode: str
) -> Image.Image | None:
    if key is None:
        return None
    if key not in inputs:
        raise InvalidParameter(f"{field}: {key} did not come with the job")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(inputs[key]), formats=INPUT_FORMATS)
            if opened.width * opened.height > MAX_INPUT_PIXELS:
                raise InvalidParameter(f"{field}: {opened.width}x{opened.height} is too large")
            upright = ImageOps.exif_transpose(opened)
            upright = _eight_bit(upright)
            whole = _on_white(upright) if mode == "RGB" else upright.convert(mode)
    except InvalidParameter:
        raise
    except Exception as error:  # whatever a decoder says of bytes that strangers made
        raise InvalidParameter(f"{field}: {key} is no picture that can be read: {error}") from None
    size = (job.width, job.height)
    if whole.size == size:
        return whole
    filter = Image.Resampling.LANCZOS if mode == "RGB" else Image.Resampling.BILINEAR
    return ImageOps.fit(whole, size, filter)


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled down; Pillow's own conversion clips it to white."""
    if not picture.mode.startswith("I"):
        return picture
    return picture.convert("I").point(lambda value: value / 256).convert("L")


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    solid = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
