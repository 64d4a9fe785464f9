"""Text-to-image, image-to-image and inpainting on one set of weights.

The pipelines of the other two kinds are made when first asked for, from the very modules of the
loaded one: by AutoPipelineFor*.from_pipe, which only builds another object around them.
(`SomePipeline.from_pipe` must not be used: it casts float16 modules to float32 in place,
https://github.com/huggingface/diffusers/issues/12754.)

Two things are the same on every family:

- Strength 0 gives the input picture back, byte for byte; nothing is rendered. Where strength x
  steps is less than one whole step, the steps are raised until it is one.
- Inpainting gives every pixel that the mask keeps back as it was: the input picture is laid over
  the rendered one there, since the VAE alone does not reproduce it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image

from farm.errors import InvalidParameter
from farm.spec import JobSpec, Kind
from workers.engines.input_pictures import init_picture, mask_picture

FEWEST_STRENGTH = 0.002
"""Below this less than one of 500 steps, the most of a job, would be done: as strength 0."""
KLEIN_MOST_PIXELS = 1024 * 1024
"""Flux2KleinInpaintPipeline shrinks larger input pictures."""


class Pipeline(NamedTuple):
    """A pipeline and the parameters of its call."""

    pipe: Any  # a DiffusionPipeline
    accepts: Mapping[str, inspect.Parameter]


class Pictures(NamedTuple):
    """The input pictures of one job, of its size; a mask is 0 (kept) or 255 (painted anew)."""

    init: Image.Image | None = None
    mask: Image.Image | None = None


class Pipelines:
    """One pipeline for each kind, all around the same modules."""

    def __init__(self, pipe: Any) -> None:
        self._made: dict[Kind, Pipeline] = {"text-to-image": _described(pipe)}

    def get(self, kind: Kind) -> Pipeline:
        """Raises InvalidParameter where diffusers has none of this kind for the model."""
        if kind not in self._made:
            self._made[kind] = _described(_from_pipe(self._made["text-to-image"].pipe, kind))
        return self._made[kind]


def _described(pipe: Any) -> Pipeline:
    return Pipeline(pipe, inspect.signature(type(pipe).__call__).parameters)


def _from_pipe(pipe: Any, kind: Kind) -> Any:
    auto = {
        "image-to-image": diffusers.AutoPipelineForImage2Image,
        "inpainting": diffusers.AutoPipelineForInpainting,
    }[kind]
    if type(pipe) is diffusers.Flux2KleinPipeline:  # it has both kinds in one, which auto lacks
        distilled = pipe.config.is_distilled
        made = diffusers.Flux2KleinInpaintPipeline(**pipe.components, is_distilled=distilled)
    else:
        try:
            made = auto.from_pipe(pipe)
        except ValueError:
            raise InvalidParameter(f"{kind}: {type(pipe).__name__} of diffusers has none") from None
    if "strength" not in inspect.signature(type(made).__call__).parameters:
        raise InvalidParameter(f"{kind}: {type(made).__name__} of diffusers knows no strength")
    made.set_progress_bar_config(disable=True)
    return made


def pictures_of(job: JobSpec, inputs: Mapping[str, bytes]) -> Pictures:
    """Raises InvalidParameter when a file is missing or is no picture."""
    return Pictures(init_picture(job, inputs), mask_picture(job, inputs))


def comes_back(job: JobSpec) -> bool:
    """Whether the job asks for nothing but its input picture."""
    return job.strength is not None and job.strength < FEWEST_STRENGTH


def arguments(chosen: Pipeline, job: JobSpec, pictures: Sequence[Pictures]) -> dict[str, Any]:
    """Keyword arguments that a kind adds to those of text-to-image.

    `job`: any of the micro-batch, all have the same kind, size and strength.
    Raises InvalidParameter for a size that the pipeline does not take.
    """
    if job.strength is None:
        return {}
    klein = type(chosen.pipe) is diffusers.Flux2KleinInpaintPipeline
    if klein and job.width * job.height > KLEIN_MOST_PIXELS:
        raise InvalidParameter(
            f"size {job.width}x{job.height}: with an input picture this model "
            f"renders up to {KLEIN_MOST_PIXELS:,} pixels"
        )
    ours: dict[str, Any] = {
        "image": [given.init for given in pictures],
        "strength": job.strength,
        "num_inference_steps": _steps(job.steps, job.strength),
    }
    if job.kind == "inpainting":
        ours["mask_image"] = [given.mask for given in pictures]
    elif klein:  # all of it anew: image-to-image
        ours["mask_image"] = [Image.new("L", (job.width, job.height), 255)] * len(pictures)
    return ours


def _steps(steps: int, strength: float) -> int:
    """The steps of the whole schedule, so that strength leaves at least one to be done.

    The pipelines do int(steps * strength) of them, the last ones.
    """
    while int(steps * strength) < 1:
        steps += 1
    return steps


def kept(images: torch.Tensor, pictures: Sequence[Pictures]) -> torch.Tensor:
    """The rendered pictures with the input picture where a mask keeps it.

    `images`: (jobs, 3, height, width), 0 to 1. Those of a wrong size stay as they are.
    """
    if pictures[0].mask is None or images.shape[2:] != floats(pictures).shape[2:]:
        return images
    masks = np.stack([np.asarray(given.mask) for given in pictures])
    anew = torch.from_numpy(masks >= 128).unsqueeze(1).to(images.device)
    return torch.where(anew, images, floats(pictures).to(images.device))


def floats(pictures: Sequence[Pictures]) -> torch.Tensor:
    """The input pictures as (jobs, 3, height, width), 0 to 1."""
    pixels = np.stack([np.asarray(given.init) for given in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
