"""Quantised models on the processor through stable-diffusion.cpp, pinned and loaded.

One context a worker, loaded once; jobs one by one, for a processor gains nothing from more. The
seed is the job's own, so the same build, files and settings give the same bytes in every process,
with any number of threads; another build of the library does not (`versions` names it).

A render cannot be stopped from inside: a cancelled one is ended by ending this process
(EngineInfo.interruptible), and the parent starts another.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from farm.errors import (
    FarmError,
    InvalidConfig,
    InvalidParameter,
    InvalidPrompt,
    ModelNotLoaded,
)
from farm.samplers import SAMPLERS
from farm.spec import JobSpec, describe, row_errors
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs, Pixels, Watch
from workers.engines.checkpoint_files import check_checkpoint
from workers.engines.sdcpp_native import OWN_CHOICE, Context, Log, build
from workers.engines.sdcpp_options import SdcppOptions, options_of

MOST_PROMPT_BYTES = 4_000
"""As UTF-8. A token may be one byte, and the text encoder's time and memory grow with the square
of their number: 4,000 take 1.3 GB, and up to 2 s; 32,000 end the process."""
TEST_SIDE = 72
"""Of the self-test's picture, in pixels: what the library rounds it up to tells the multiple."""
MULTIPLES = (8, 16, 32, 64)


class SdcppEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options: SdcppOptions = options_of(config)
        self._log = Log()
        self._context: Context | None = None
        self._distilled = False  # guidance is an input of the model
        self._multiple = 0  # of a picture's sides, in pixels

    def load(self) -> EngineInfo:
        """Check every file, load, and render a first small picture."""
        tensors = [name for file in self._options.files.values() for name in check_checkpoint(file)]
        self._distilled = any("guidance_in." in name for name in tensors)
        digest = self._options.weights_sha256()
        self._context = Context(self._options, self._log)
        device = self._device()
        self._multiple = self._self_test()
        return EngineInfo(device, 1, digest, self._versions(), interruptible=False)

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        return [self._one(job, watch) for job in jobs]

    def ease(self) -> str | None:
        return None

    def close(self) -> None:
        if self._context:
            self._context.close()
        self._context = None
        gc.collect()

    def _one(self, job: JobSpec, watch: Watch) -> Pixels | FarmError:
        if refusal := self._refusal(job):
            return refusal
        pixels = self._picture(job, watch)
        height, width = pixels.shape[:2]
        if (width, height) != (job.width, job.height):
            return InvalidParameter(
                f"size {job.width}x{job.height}: this model gives {width}x{height}"
            )
        return pixels

    def _picture(self, job: JobSpec, watch: Watch) -> Pixels:
        """Whatever size it comes in. `watch` may raise; so does this, once the call is over."""

        def progress(done: int, total: int) -> None:
            if done:  # a VAE in tiles tells its tiles too: a sign of life, and no more
                watch.step(done if total == job.steps else job.steps, job.steps)

        assert self._context is not None
        return self._context.render(progress, **self._arguments(job))

    def _arguments(self, job: JobSpec) -> dict[str, Any]:
        """Those of the library's generate_image, all within what it is known to survive.

        Guidance is as diffusers has it: up to 1 means none, and a model that takes the scale as
        an input gets it there.
        """
        sampler = SAMPLERS[job.scheduler].sdcpp if job.scheduler else None
        method, sigmas = sampler or ("default", "default")
        scale = job.guidance_scale
        guidance = (
            {"cfg_scale": 1.0, "guidance": scale}
            if self._distilled
            else {"cfg_scale": max(1.0, scale)}
        )
        tiling = {"vae_tiling": True, "vae_tile_size": self._options.tile}
        return {
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "width": job.width,
            "height": job.height,
            "sample_steps": job.steps,
            "sample_method": method,
            "scheduler": sigmas,
            "seed": job.seed,
            **guidance,
            **(tiling if self._options.tile else {}),
            **OWN_CHOICE,
        }

    def _refusal(self, job: JobSpec) -> FarmError | None:
        """What is wrong with a job, or what of it this engine or this model cannot do."""
        try:  # anew: what native code would not survive must not reach it by any way
            JobSpec(**job.__dict__)
        except ValidationError as error:
            rows = row_errors(0, error)
            prompt = any(row.code == InvalidPrompt.code for row in rows)
            return (InvalidPrompt if prompt else InvalidParameter)(describe(rows))
        return _text_refusal(job) or self._model_refusal(job)

    def _model_refusal(self, job: JobSpec) -> FarmError | None:
        """Samplers and sizes."""
        known = {name: sampler for name, sampler in SAMPLERS.items() if sampler.sdcpp}
        can = [name for name, sampler in known.items() if self._log.flow or not sampler.flow]
        if job.scheduler and job.scheduler not in can:
            kind = "this model" if job.scheduler in known else "engine sdcpp"
            return InvalidParameter(f"scheduler {job.scheduler}: {kind} can do {', '.join(can)}")
        width, height = (_up(side, self._multiple) for side in (job.width, job.height))
        if (width, height) != (job.width, job.height):
            return InvalidParameter(
                f"size {job.width}x{job.height}: this model takes multiples of {self._multiple}, "
                f"the next is {width}x{height}"
            )
        return None

    def _self_test(self) -> int:
        """A first small picture, of more than one colour; returns what sides are multiples of."""
        where = ", ".join(str(file) for file in self._options.files.values())
        job = JobSpec(
            model=self._config.model,
            prompt="a test",
            width=TEST_SIDE,
            height=TEST_SIDE,
            steps=1,
            guidance_scale=1.0,
            seed=0,
        )
        try:
            pixels = self._picture(job, _NoWatch())
        except FarmError as error:
            raise ModelNotLoaded(
                f"{where}: the first test picture failed, {error.message}"
            ) from error
        if pixels.min() == pixels.max():
            raise ModelNotLoaded(
                f"{where}: the first test picture is of one colour; wrong weights?"
            )
        for multiple in MULTIPLES:
            if pixels.shape[:2] == (_up(TEST_SIDE, multiple), _up(TEST_SIDE, multiple)):
                return multiple
        raise ModelNotLoaded(f"{where}: a test picture of {TEST_SIDE} pixels is {pixels.shape}")

    def _device(self) -> str:
        """What the library computes on; it falls back to the processor with a line in its log."""
        found = self._log.backend.lower() or "cpu"
        asked, _, number = (self._config.device or found).partition(":")
        if found.rstrip("0123456789") != asked.rstrip("0123456789") or number not in ("", "0"):
            raise InvalidConfig(
                f"device {self._config.device!r}: this build of stable-diffusion.cpp runs on "
                f"{found}; another needs another build (see the Makefile), and the second GPU "
                "CUDA_VISIBLE_DEVICES=1"
            )
        return found

    def _versions(self) -> dict[str, str]:
        chosen = {"wtype": self._options.wtype, "rng": self._options.rng}
        threads = {"threads": str(self._options.threads)}
        return {"python": platform.python_version(), **build(), **chosen, **threads}


def _text_refusal(job: JobSpec) -> FarmError | None:
    for text in (job.prompt, job.negative_prompt):
        if "<lora:" in text.lower():
            return InvalidPrompt("<lora:...> in a prompt would open a file; it is not allowed")
        if (length := len(text.encode())) > MOST_PROMPT_BYTES:
            return InvalidPrompt(
                f"{length:,} bytes of text; engine sdcpp reads {MOST_PROMPT_BYTES:,} at most"
            )
    return None


class _NoWatch:
    def step(self, done: int, total: int) -> None:
        pass


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple
