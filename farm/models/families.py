"""What a family's models are asked for where a job says nothing, and how the hub tells a family.

Sources: the defaults of the pipelines of diffusers 0.42 (`__call__`; for sizes, the published
models' `sample_size` times 8), and for the distilled models their cards: sd-turbo, sdxl-turbo,
stable-diffusion-3.5-large-turbo, FLUX.1-schnell, FLUX.2-klein-4B, Z-Image-Turbo.
"""

from __future__ import annotations

from farm.catalog import Defaults, Family


def _told(side: int, steps: int, guidance: float) -> Defaults:
    return Defaults(width=side, height=side, steps=steps, guidance_scale=guidance)


# By family, and by a word in the model's name that tells of others of the family.
_DEFAULTS: dict[Family, dict[str, Defaults]] = {
    "sd1": {"": _told(512, 50, 7.5)},
    "sd-turbo": {"": _told(512, 1, 0.0)},
    "sdxl": {"": _told(1024, 50, 5.0), "turbo": _told(512, 1, 0.0)},
    "sd3": {"": _told(1024, 28, 7.0), "turbo": _told(1024, 4, 0.0)},
    "flux": {"": _told(1024, 28, 3.5), "schnell": _told(1024, 4, 0.0)},
    "flux2-klein": {"": _told(1024, 4, 1.0), "base": _told(1024, 50, 4.0)},
    "qwen-image": {"": _told(1024, 50, 4.0)},
    "z-image": {"": _told(1024, 50, 5.0), "turbo": _told(1024, 9, 0.0)},
}
_PIPELINES: dict[str, Family] = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2-klein",
    "QwenImagePipeline": "qwen-image",
    "ZImagePipeline": "z-image",
}


def family_defaults(family: Family, *names: str) -> Defaults | None:
    """Size, steps and guidance of a family, as the names of a model tell; None for `other`."""
    known = _DEFAULTS.get(family, {})
    text = " ".join(names).lower()
    return next((known[word] for word in known if word and word in text), known.get(""))


def family_of(pipeline: str, *names: str) -> Family | None:
    """The family that a pipeline's class (`_class_name` of model_index.json) is of, if known."""
    family = _PIPELINES.get(pipeline)
    if family == "sd1" and "turbo" in " ".join(names).lower():
        return "sd-turbo"
    return family
