"""The common names of samplers, and what each engine calls them.

Names as in the web UIs that most people know; the pairs with diffusers' classes are those of
https://huggingface.co/docs/diffusers/api/schedulers/overview.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Sampler(NamedTuple):
    """`diffusers`: a scheduler class, and the config values that differ from the model's own.

    `sdcpp`: sample_method and scheduler of sigmas in stable-diffusion.cpp; None where it has
    none. `flow`: for flow-matching models only.
    """

    diffusers: str
    config: Mapping[str, Any] = {}
    sdcpp: tuple[str, str] | None = None
    flow: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", sdcpp=("ddim_trailing", "default")),
    "ddpm": Sampler("DDPMScheduler"),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),  # else no fewer than 4 steps
    "lms": Sampler("LMSDiscreteScheduler"),
    "euler": Sampler("EulerDiscreteScheduler", sdcpp=("euler", "default")),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", sdcpp=("euler_a", "default")),
    "heun": Sampler("HeunDiscreteScheduler", sdcpp=("heun", "default")),
    "dpm2": Sampler("KDPM2DiscreteScheduler", sdcpp=("dpm2", "default")),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler"),
    "dpm++_2m": Sampler("DPMSolverMultistepScheduler", sdcpp=("dpm++2m", "default")),
    "dpm++_2m_karras": Sampler(
        "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, ("dpm++2m", "karras")
    ),
    "dpm++_2m_sde": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_sde": Sampler("DPMSolverSinglestepScheduler"),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "deis": Sampler("DEISMultistepScheduler"),
    "lcm": Sampler("LCMScheduler", sdcpp=("lcm", "default")),
    "tcd": Sampler("TCDScheduler", sdcpp=("tcd", "default")),
    "flow_euler": Sampler("FlowMatchEulerDiscreteScheduler", {}, ("euler", "default"), True),
    "flow_heun": Sampler("FlowMatchHeunDiscreteScheduler", {}, ("heun", "default"), True),
}
_NAME_OF = {known.diffusers: name for name, known in reversed(SAMPLERS.items())}  # the first


def canonical_scheduler(name: str) -> str:
    """The common name for such a name or a diffusers class name.

    Raises ValueError when neither is known.
    """
    found = _NAME_OF.get(name, name.lower())
    if found not in SAMPLERS:
        raise ValueError("unknown scheduler")
    return found
