"""Schedulers by their common names, for a model that came with one of its own."""

from __future__ import annotations

import copy
from typing import Any

import diffusers

from farm.errors import InvalidParameter
from farm.samplers import SAMPLERS
from workers.engine import said

FEW_STEPS = (diffusers.LCMScheduler, diffusers.TCDScheduler)
"""For models and LoRAs distilled to few steps. No scheduler names them as compatible, but they
take the config of any that DDIM can (https://huggingface.co/docs/diffusers/using-diffusers/
inference_with_lcm)."""


def new_scheduler(own: Any, name: str | None) -> Any:
    """A fresh scheduler for one call, by common name; None: as the model came.

    Raises InvalidParameter, which names those that the model can do.
    """
    if name is None:
        return copy.deepcopy(own)
    sampler = SAMPLERS[name]
    fitting = {cls.__name__: cls for cls in own.compatibles}
    if "DDIMScheduler" in fitting:
        fitting |= {cls.__name__: cls for cls in FEW_STEPS}
    if sampler.diffusers not in fitting:
        known = ", ".join(name for name, s in SAMPLERS.items() if s.diffusers in fitting)
        raise InvalidParameter(f"scheduler {name}: this model can do {known or 'only its own'}")
    try:
        return fitting[sampler.diffusers].from_config(own.config, **sampler.config)
    except (ImportError, ValueError, NotImplementedError) as error:
        raise InvalidParameter(f"scheduler {name}: {said(error)}") from error
