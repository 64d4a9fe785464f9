"""Any text-to-image DiffusionPipeline of the diffusers library, pinned and loaded.

One load serves text-to-image, image-to-image and inpainting (diffusers_kinds), LoRAs by name
(diffusers_loras) and prompts of any length that the model can read (diffusers_text).

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

import gc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farm.errors import (
    BadImage,
    FarmError,
    Invalid,
    InvalidConfig,
    InvalidParameter,
    ModelNotLoaded,
    OutOfMemory,
    PictureBlocked,
)
from farm.spec import JobSpec
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs, NoWatch, Pixels, Watch, said
from workers.engines import diffusers_kinds as kinds
from workers.engines.diffusers_failures import translated
from workers.engines.diffusers_kinds import Pictures, Pipeline, Pipelines
from workers.engines.diffusers_load import dtype_told, load, versions
from workers.engines.diffusers_loras import Loras
from workers.engines.diffusers_memory import Easing, default_side, first_cap, give_back
from workers.engines.diffusers_schedulers import new_scheduler
from workers.engines.diffusers_text import Size, Texts, texts
from workers.engines.diffusers_vae import restore_dtype, retry_in_float32

SELF_TEST_SIDE, SELF_TEST_STEPS = 64, 4  # PNDM fails with fewer than four


@dataclass(frozen=True)
class Floats:
    """A micro-batch as the pipeline gives it.

    `images`: (jobs, 3, height, width), 0 to 1. `refused`: by the model's own safety checker.
    """

    images: torch.Tensor
    refused: Sequence[bool]


@dataclass(frozen=True)
class Group:
    """Jobs of one call of a pipeline: their texts are of one size."""

    jobs: Sequence[JobSpec]
    pictures: Sequence[Pictures]
    size: Size


class DiffusersEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._pipe: Any = None
        self._scheduler: Any = None  # as the model came, never used itself
        self._pipelines: Pipelines
        self._texts: Texts
        self._loras: Loras
        self._easing: Easing
        self._vae: Any = None
        self._vae_dtype: torch.dtype | None = None

    def load(self) -> EngineInfo:
        """Check every file, load, and render a first small picture."""
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        if self._config.strict:  # TF32 stays as it is: less exact, but the same each time
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        loaded = load(self._config)
        self._pipe, self._scheduler = loaded.pipeline, loaded.pipeline.scheduler
        self._easing = loaded.easing
        self._prepare()
        self._self_test()
        cap = first_cap(self._config, loaded.device, self._render_alike)
        return EngineInfo(
            str(loaded.device),
            cap,
            loaded.weights_sha256,
            self._versions(str(loaded.device)),
            memory=loaded.memory,
            loras=self._loras.sha256,
        )

    def _prepare(self) -> None:
        """What stands around the loaded pipeline."""
        self._pipelines = Pipelines(self._pipe)
        base = self._pipelines.get("text-to-image")
        if "prompt" not in base.accepts or "generator" not in base.accepts:
            raise InvalidConfig(f"{type(self._pipe).__name__} is no text-to-image pipeline")
        self._texts = texts(base, self._config.strict)
        self._loras = Loras(self._pipe, self._config.loras)
        self._vae = getattr(self._pipe, "vae", None)
        if self._vae is not None:
            self._vae_dtype = self._vae.dtype
            retry_in_float32(self._vae)

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        results: dict[int, Pixels | FarmError] = {}
        groups: defaultdict[Size, dict[int, Pictures]] = defaultdict(dict)
        for place, job in enumerate(jobs):
            try:
                groups[self._texts.size(job)][place] = kinds.pictures_of(job, inputs)
            except Invalid as error:
                results[place] = error
        for number, (size, given) in enumerate(groups.items()):
            short = len(jobs) - len(given) if self._config.strict else 0
            places = [*given, *[max(given)] * short]
            group = Group([jobs[p] for p in places], [given[p] for p in places], size)
            made = self._pixels(group, _Part(watch, number, len(groups)))
            results |= zip(given, made, strict=False)
        return [results[place] for place in range(len(jobs))]

    def _pixels(self, group: Group, watch: Watch) -> Sequence[Pixels | FarmError]:
        floats = self._floats(group, watch)
        height, width = floats.images.shape[2:]
        first = group.jobs[0]
        if (width, height) != (first.width, first.height):
            told = f"size {first.width}x{first.height}: this model gives {width}x{height}"
            return [InvalidParameter(told)] * len(group.jobs)
        finite = floats.images.isfinite().flatten(1).all(1).tolist()
        return [
            PictureBlocked()
            if refused
            else picture
            if good
            else BadImage("the picture has NaN values")
            for picture, good, refused in zip(
                to_pixels(floats.images), finite, floats.refused, strict=True
            )
        ]

    def render_floats(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Floats:
        """Jobs of one text size, before they are rounded to bytes; raises as `render` does."""
        pictures = [kinds.pictures_of(job, inputs) for job in jobs]
        return self._floats(Group(jobs, pictures, self._texts.size(jobs[0])), watch)

    def _floats(self, group: Group, watch: Watch) -> Floats:
        failure: FarmError | None = None
        first = group.jobs[0]
        if kinds.comes_back(first):
            watch.step(1, 1)
            return Floats(kinds.floats(group.pictures), [False] * len(group.jobs))
        restore_dtype(self._vae, self._vae_dtype)
        chosen = self._pipelines.get(first.kind)
        chosen.pipe.scheduler = new_scheduler(self._scheduler, first.scheduler)
        try:
            self._loras.use(first.loras)
            output = chosen.pipe(**self._arguments(chosen, group, watch))
            refused = getattr(output, "nsfw_content_detected", None) or [False] * len(group.jobs)
            return Floats(kinds.kept(output.images.float(), group.pictures), refused)
        except (RuntimeError, ValueError) as error:
            failure = translated(error)
            if failure is None:
                raise
        finally:
            self._pipe.maybe_free_model_hooks()  # offloading is its matter, whichever kind ran
        if isinstance(failure, OutOfMemory):  # its frames are gone now, and what they held
            give_back()
        raise failure

    def ease(self) -> str | None:
        return self._easing.ease()

    def close(self) -> None:
        self._pipe = self._scheduler = self._vae = None
        gc.collect()

    def _arguments(self, chosen: Pipeline, group: Group, watch: Watch) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call: those of ours that its signature has."""
        first = group.jobs[0]
        guidance = "guidance_scale"
        true_cfg = chosen.accepts.get("true_cfg_scale")
        if true_cfg and (true_cfg.default or 0) > 1:  # Qwen-Image: plain guidance by this name
            guidance = "true_cfg_scale"

        def after_step(pipe: Any, step: int, timestep: Any, state: Any) -> dict[str, Any]:
            watch.step(step + 1, getattr(pipe, "num_timesteps", first.steps))
            return {}

        ours = {
            "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in group.jobs],
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.steps,
            guidance: first.guidance_scale,
            "output_type": "pt",
            "callback_on_step_end": after_step,
            **self._texts.arguments(group.jobs, group.size),
            **kinds.arguments(chosen, first, group.pictures),
        }
        return {name: value for name, value in ours.items() if name in chosen.accepts}

    def _self_test(self) -> None:
        """A first small picture: finite, and of more than one colour."""
        job = self._test_job(SELF_TEST_SIDE)
        where = self._config.weights.path or self._config.weights.repo
        try:
            floats = self.render_floats([job], NoWatch())
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

    def _test_job(self, side: int) -> JobSpec:
        return JobSpec(
            model=self._config.model,
            prompt="a test",
            width=side,
            height=side,
            steps=SELF_TEST_STEPS,
            guidance_scale=1.0,
            seed=0,
        )

    def _render_alike(self, count: int) -> None:
        """So many pictures of the model's own size at once, to see what memory they take."""
        self.render_floats([self._test_job(default_side(self._pipe))] * count, NoWatch())

    def _versions(self, device: str) -> dict[str, str]:
        found = {**versions(), "dtype": dtype_told(self._pipe), **self._easing.told()}
        if device.startswith("cuda"):
            found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name(device)}
        else:
            instructions = torch.backends.cpu.get_cpu_capability()
            found |= {"threads": str(torch.get_num_threads()), "cpu": instructions}
        return found


class _Part:
    """The watch of one of several equal parts of a micro-batch."""

    def __init__(self, watch: Watch, number: int, parts: int) -> None:
        self._watch, self._number, self._parts = watch, number, parts

    def step(self, done: int, total: int) -> None:
        self._watch.step(self._number * total + done, self._parts * total)


def to_pixels(images: torch.Tensor) -> list[Pixels]:
    """(n, 3, h, w) floats, 0 to 1, to n pictures (h, w, 3): the same bytes as the pipeline's own.

    diffusers.image_processor.VaeImageProcessor.numpy_to_pil rounds in the same way.
    """
    rounded = (images.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)
    pixels: list[Pixels] = list(rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return pixels
