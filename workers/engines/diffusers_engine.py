"""Any text-to-image DiffusionPipeline of the diffusers library, pinned and loaded.

A micro-batch is one call of the pipeline with lists of prompts, negatives and generators; each
job's noise comes from its own generator on the CPU, seeded anew for each attempt. At one size of
micro-batch a picture is then bit-equal whatever its neighbours; between sizes float32 differs by
about 5e-6 of the range 0 to 1. So the strict mode, in which the child pads every micro-batch to
the cap, gives equal bytes. On a CPU they also depend on the number of threads, which is told
among the versions.

An empty negative prompt is always encoded as such (SDXL alone has zeros for "none"): a list
cannot hold both, and a picture must not depend on its neighbours.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farm.errors import (
    BadImage,
    EngineCrashed,
    FarmError,
    InvalidConfig,
    InvalidParameter,
    ModelNotLoaded,
    OutOfMemory,
    PictureBlocked,
)
from farm.samplers import SAMPLERS
from farm.spec import JobSpec
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs, Pixels, Watch, said
from workers.engines.diffusers_load import load, versions

SELF_TEST_SIDE, SELF_TEST_STEPS = 64, 4  # PNDM fails with fewer than four


@dataclass(frozen=True)
class Floats:
    """A micro-batch as the pipeline gives it.

    `images`: (jobs, 3, height, width), 0 to 1. `refused`: by the model's own safety checker.
    """

    images: torch.Tensor
    refused: Sequence[bool]


class DiffusersEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._pipe: Any = None
        self._scheduler: Any = None  # as the model came, never used itself
        self._accepts: dict[str, inspect.Parameter] = {}

    def load(self) -> EngineInfo:
        """Check every file, load, and render a first small picture."""
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        if self._config.strict:  # TF32 stays as it is: less exact, but the same each time
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        loaded = load(self._config)
        self._pipe, self._scheduler = loaded.pipeline, loaded.pipeline.scheduler
        self._accepts = dict(inspect.signature(type(self._pipe).__call__).parameters)
        if "prompt" not in self._accepts or "generator" not in self._accepts:
            raise InvalidConfig(f"{type(self._pipe).__name__} is no text-to-image pipeline")
        self._self_test()
        device = str(loaded.device)
        return EngineInfo(
            device, self._config.cap(device), loaded.weights_sha256, self._versions(device)
        )

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        floats = self.render_floats(jobs, watch)
        height, width = floats.images.shape[2:]
        if (width, height) != (jobs[0].width, jobs[0].height):
            asked = f"size {jobs[0].width}x{jobs[0].height}"
            return [InvalidParameter(f"{asked}: this model gives {width}x{height}")] * len(jobs)
        finite = floats.images.isfinite().flatten(1).all(1).tolist()
        pixels = to_pixels(floats.images)
        return [
            PictureBlocked()
            if refused
            else picture
            if good
            else BadImage("the picture has NaN values")
            for picture, good, refused in zip(pixels, finite, floats.refused, strict=True)
        ]

    def render_floats(self, jobs: Sequence[JobSpec], watch: Watch) -> Floats:
        """The micro-batch before it is rounded to bytes; raises as `render` does."""
        failure: FarmError | None = None
        self._pipe.scheduler = self._new_scheduler(jobs[0].scheduler)
        try:
            output = self._pipe(**self._arguments(jobs, watch))
            refused = getattr(output, "nsfw_content_detected", None) or [False] * len(jobs)
            return Floats(output.images.float(), refused)
        except (RuntimeError, ValueError) as error:
            failure = _translated(error)
            if failure is None:
                raise
        if isinstance(failure, OutOfMemory):  # its frames are gone now, and what they held
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        raise failure

    def ease(self) -> str | None:
        return None

    def close(self) -> None:
        self._pipe = self._scheduler = None
        gc.collect()

    def _arguments(self, jobs: Sequence[JobSpec], watch: Watch) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call: those of ours that its signature has."""
        first = jobs[0]
        guidance = "guidance_scale"
        true_cfg = self._accepts.get("true_cfg_scale")
        if true_cfg and (true_cfg.default or 0) > 1:  # Qwen-Image: plain guidance by this name
            guidance = "true_cfg_scale"

        def after_step(pipe: Any, step: int, timestep: Any, state: Any) -> dict[str, Any]:
            watch.step(step + 1, getattr(pipe, "num_timesteps", first.steps))
            return {}

        ours = {
            "prompt": [job.prompt for job in jobs],
            "negative_prompt": [job.negative_prompt for job in jobs],
            "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.steps,
            guidance: first.guidance_scale,
            "output_type": "pt",
            "callback_on_step_end": after_step,
        }
        return {name: value for name, value in ours.items() if name in self._accepts}

    def _new_scheduler(self, name: str | None) -> Any:
        """A fresh scheduler for one call, by alias; None: as the model came.

        Raises InvalidParameter, which names those that the model can do.
        """
        if name is None:
            return copy.deepcopy(self._scheduler)
        sampler = SAMPLERS[name]
        fitting = {cls.__name__: cls for cls in self._scheduler.compatibles}
        if sampler.diffusers not in fitting:
            known = ", ".join(name for name, s in SAMPLERS.items() if s.diffusers in fitting)
            raise InvalidParameter(f"scheduler {name}: this model can do {known or 'only its own'}")
        try:
            chosen = fitting[sampler.diffusers]
            return chosen.from_config(self._scheduler.config, **sampler.config)
        except (ImportError, ValueError, NotImplementedError) as error:
            raise InvalidParameter(f"scheduler {name}: {said(error)}") from error

    def _self_test(self) -> None:
        """A first small picture: finite, and of more than one colour."""
        job = JobSpec(
            model=self._config.model,
            prompt="a test",
            width=SELF_TEST_SIDE,
            height=SELF_TEST_SIDE,
            steps=SELF_TEST_STEPS,
            guidance_scale=1.0,
            seed=0,
        )
        where = self._config.weights.path or self._config.weights.repo
        try:
            floats = self.render_floats([job], _NoWatch())
        except Exception as error:
            raise ModelNotLoaded(
                f"{where}: the first test picture failed, {said(error)}"
            ) from error
        if not bool(floats.images.isfinite().all()):
            raise ModelNotLoaded(f"{where}: the first test picture has NaN values; wrong weights?")
        if not floats.refused[0] and floats.images.min() == floats.images.max():
            raise ModelNotLoaded(
                f"{where}: the first test picture is of one colour; wrong weights?"
            )

    def _versions(self, device: str) -> dict[str, str]:
        found = {**versions(), "dtype": str(self._pipe.dtype).removeprefix("torch.")}
        if device.startswith("cuda"):
            found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name(device)}
        else:
            instructions = torch.backends.cpu.get_cpu_capability()
            found |= {"threads": str(torch.get_num_threads()), "cpu": instructions}
        return found


class _NoWatch:
    def step(self, done: int, total: int) -> None:
        pass


def to_pixels(images: torch.Tensor) -> list[Pixels]:
    """(n, 3, h, w) floats, 0 to 1, to n pictures (h, w, 3): the same bytes as the pipeline's own.

    diffusers.image_processor.VaeImageProcessor.numpy_to_pil rounds in the same way.
    """
    rounded = (images.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)
    pixels: list[Pixels] = list(rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return pixels


def _translated(error: Exception) -> FarmError | None:
    """What the farm calls a failure of torch or of a pipeline; None when it has no name."""
    text = said(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return OutOfMemory(text)
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return EngineCrashed(f"the device failed, {text}")
    if isinstance(error, ValueError) and "height" in text and "width" in text:
        return InvalidParameter(text)
    return None
