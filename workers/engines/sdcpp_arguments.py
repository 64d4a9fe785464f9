"""What a job means to stable-diffusion.cpp: arguments of its generate_image, no library needed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from farm.errors import FarmError, InvalidPrompt
from farm.samplers import SAMPLERS
from farm.spec import JobSpec, engine_refuses

LONGEST_SCHEDULE = 1_000
"""Steps that a model was trained on: a schedule has no use for more."""
LIBRARYS_CHOICE = {"eta": math.inf, "flow_shift": math.inf}
"""Arguments that leave a value to the sampler and the model; the binding's eta is none at all."""
CLIP_LAYERS = {"SD 1": 1, "Instruct-Pix2Pix": 1, "SD 2": 2, "SDXL": 2, "SD3": 2}
"""What the library takes a model for, by the beginning -> its own clip_skip for it, where 1 leaves
no layer of the text encoder out. Other models read no layer of CLIP but the last, or have none."""


class Steps(NamedTuple):
    """`schedule`: steps from pure noise; `taken`: of these, the last ones, which a render takes.

    `strength`: the library's, which makes it so.
    """

    schedule: int
    taken: int
    strength: float


def steps_of(job: JobSpec) -> Steps:
    """Of a job whose strength is not 0.

    As in diffusers int(steps * strength) are taken, but one at the least: where that gives none,
    the schedule is made finer, so that a small strength stays a small change. The library itself
    takes one more than floor(steps * strength) says, and never none
    (prepare_image_generation_latents in stable-diffusion.cpp).
    """
    if job.strength is None:
        return Steps(job.steps, job.steps, 1.0)
    schedule = max(job.steps, min(LONGEST_SCHEDULE, math.ceil(1 / job.strength)))
    taken = max(1, int(schedule * job.strength))
    return Steps(schedule, taken, 1.0 if taken == schedule else (taken - 0.5) / schedule)


def clip_skip_of(job: JobSpec, version: str) -> int | None:
    """The library's clip_skip, -1 for the model's own; None: this model has nothing to skip.

    A job says how many layers more than usual are left out, as in diffusers; the library says how
    many are, and 1 for none.
    """
    if job.clip_skip is None:
        return -1
    usual = [layers for name, layers in CLIP_LAYERS.items() if version.startswith(name)]
    return job.clip_skip + usual[0] if usual else None


def arguments(job: JobSpec, version: str, tile: str | None, *, distilled: bool) -> dict[str, Any]:
    """Those of the library's generate_image but the pictures, all such as it is known to survive.

    `version`: what the library takes the model for. `tile`: of the VAE, "WxH" latent pixels.
    Guidance is as diffusers has it: up to 1 means none, and a `distilled` model, which takes the
    scale as an input, gets it there.
    """
    sampler = SAMPLERS[job.scheduler].sdcpp if job.scheduler else None
    method, sigmas = sampler or ("default", "default")
    scale, steps = job.guidance_scale, steps_of(job)
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "width": job.width,
        "height": job.height,
        "sample_steps": steps.schedule,
        "strength": steps.strength,
        "sample_method": method,
        "scheduler": sigmas,
        "seed": job.seed,
        "clip_skip": clip_skip_of(job, version),
        "cfg_scale": 1.0 if distilled else max(1.0, scale),
        **({"guidance": scale} if distilled else {}),
        **({"vae_tiling": True, "vae_tile_size": tile} if tile else {}),
        **LIBRARYS_CHOICE,
    }


def text_refusal(job: JobSpec) -> FarmError | None:
    """What of a job's texts the library would not survive, or take for something else."""
    for text in (job.prompt, job.negative_prompt):
        if why := engine_refuses("sdcpp", text):
            return InvalidPrompt(why)
    return None
