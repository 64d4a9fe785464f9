"""Quantised models on the processor through stable-diffusion.cpp, pinned and loaded.

One context a worker, loaded once; jobs one by one, for a processor gains nothing from more. The
seed is the job's own, so the same build, files and settings give the same bytes in every process,
with any number of threads; another build of the library does not (`versions` names it).

A strength of 0 gives the input picture itself, not one that went through the VAE. What the mask
of an inpainting job leaves unpainted is the input's, pixel for pixel.

A render cannot be stopped from inside: a cancelled one is ended by ending this process
(EngineInfo.interruptible), and the parent starts another.
"""

from __future__ import annotations

import gc
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
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
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs, NoWatch, Pixels, Watch
from workers.engines.checkpoint_files import Tensor, checked_tensors
from workers.engines.input_pictures import init_picture, mask_picture
from workers.engines.memory_limit import limit_memory
from workers.engines.sdcpp_arguments import arguments, clip_skip_of, steps_of, text_refusal
from workers.engines.sdcpp_loras import Loras
from workers.engines.sdcpp_native import Context, Log, build
from workers.engines.sdcpp_options import OWN_TILES, SMALL_TILES, SdcppOptions, options_of

TEST_SIDE = 72
"""Of the self-test's picture, in pixels: what the library rounds it up to tells the multiple."""
MULTIPLES = (8, 16, 32, 64)
_ENCODER = re.compile(r"^((first_stage_model|vae|tae)\.)?encoder\.")
_CLIP = re.compile(r"text_model\.encoder\.|transformer\.resblocks\.")


class SdcppEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options: SdcppOptions = options_of(config)
        self._tile = self._options.tile
        self._log = Log()
        self._context: Context | None = None
        self._loras = Loras({}, [])
        self._encoder = False  # the VAE reads pictures too
        self._clip = False  # there is a CLIP text encoder
        self._distilled = False  # guidance is an input of the model
        self._multiple = 0  # of a picture's sides, in pixels

    def load(self) -> EngineInfo:
        """Check every file, load, and render a first small picture."""
        memory = limit_memory(self._config.memory_limit)
        parts = {part: checked_tensors(file) for part, file in self._options.files.items()}
        self._look_at(parts)
        self._check_room(parts.values())
        digest = self._options.weights_sha256()
        self._context = Context(self._options, self._log, encoder=self._encoder)
        device = self._device()
        self._multiple = self._self_test()
        for _ in range(self._config.eased):
            self.ease()
        return EngineInfo(
            device,
            1,
            digest,
            self._versions(),
            interruptible=False,
            memory=memory if device == "cpu" else None,
            loras=self._loras.hashes,
        )

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        return [self._one(job, watch, inputs) for job in jobs]

    def ease(self) -> str | None:
        if self._tile == SMALL_TILES:
            return None
        self._tile = SMALL_TILES if self._tile else OWN_TILES
        small = "small " if self._tile == SMALL_TILES else ""
        return f"the VAE reads and writes pictures in {small}tiles"

    def close(self) -> None:
        if self._context:
            self._context.close()
        self._context = None
        gc.collect()

    # ----------------------------------------------------------------------- load
    def _look_at(self, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """What the files can do, by the names and shapes of their tensors."""
        vae = parts.get("taesd") or parts.get("vae") or parts.get("model") or []
        tensors = [tensor for part in parts.values() for tensor in part]
        self._encoder = any(_ENCODER.match(tensor.name) for tensor in vae)
        self._clip = any(_CLIP.search(tensor.name) for tensor in tensors)
        self._distilled = any("guidance_in." in tensor.name for tensor in tensors)
        self._loras = Loras(self._config.loras, tensors)

    def _check_room(self, parts: Iterable[Sequence[Tensor]]) -> None:
        """Weights beyond the limit would end the process without a word."""
        limit = self._config.memory_limit
        size = sum(tensor.end - tensor.begin for part in parts for tensor in part)
        if limit and self._options.wtype == "default" and size > limit:
            raise ModelNotLoaded(
                f"model {self._config.model}: {size:,} bytes of weights, and the worker's memory "
                f"limit is {limit:,}; raise it, or quantise the model: farm models convert"
            )

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
            pixels = self._picture(job, NoWatch())
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
        if self._config.memory_limit and found != "cpu":
            raise InvalidConfig(f"memory_limit: engine sdcpp has none on {found}, on a CPU only")
        return found

    def _versions(self) -> dict[str, str]:
        chosen = {"wtype": self._options.wtype, "rng": self._options.rng}
        chosen |= {"threads": str(self._options.threads)}
        if self._tile:
            chosen["vae_tiling"] = self._tile
        return {"python": platform.python_version(), **build(), **chosen}

    # --------------------------------------------------------------------- render
    def _one(self, job: JobSpec, watch: Watch, inputs: Inputs) -> Pixels | FarmError:
        if refusal := self._refusal(job):
            return refusal
        try:
            init, mask = init_picture(job, inputs), mask_picture(job, inputs)
        except InvalidParameter as error:
            return error
        if init and not job.strength:
            return np.asarray(init)
        pixels = self._picture(job, watch, init, mask)
        if refusal := self._loras.refusal(job.loras):  # as the render has shown
            return refusal
        height, width = pixels.shape[:2]
        if (width, height) != (job.width, job.height):
            return InvalidParameter(
                f"size {job.width}x{job.height}: this model gives {width}x{height}"
            )
        if init and mask:
            return np.where(np.asarray(mask)[..., None], pixels, np.asarray(init))
        return pixels

    def _picture(
        self,
        job: JobSpec,
        watch: Watch,
        init: Image.Image | None = None,
        mask: Image.Image | None = None,
    ) -> Pixels:
        """Whatever size it comes in. `watch` may raise; so does this, once the call is over."""
        reached, steps = 0, steps_of(job).taken

        def progress(done: int, total: int) -> None:
            nonlocal reached
            if done:  # a VAE in tiles tells its tiles too: a sign of life, and no more
                reached = max(reached, done) if total == steps else reached
                watch.step(reached, steps)

        assert self._context is not None
        loras: dict[Path, float] = self._loras.chosen(job.loras)
        told: dict[str, Any] = arguments(
            job, self._log.version, self._tile, distilled=self._distilled
        )
        pixels = self._context.render(progress, loras, **told, init_image=init, mask_image=mask)
        self._loras.note(self._log.taken, loras)
        return pixels

    def _refusal(self, job: JobSpec) -> FarmError | None:
        """What is wrong with a job, or what of it this engine or this model cannot do."""
        try:  # anew: what native code would not survive must not reach it by any way
            JobSpec(**job.__dict__)
        except ValidationError as error:
            rows = row_errors(0, error)
            prompt = any(row.code == InvalidPrompt.code for row in rows)
            return (InvalidPrompt if prompt else InvalidParameter)(describe(rows))
        return (
            text_refusal(job)
            or self._sampler_refusal(job)
            or self._model_refusal(job)
            or self._loras.refusal(job.loras)
        )

    def _sampler_refusal(self, job: JobSpec) -> FarmError | None:
        known = {name: sampler for name, sampler in SAMPLERS.items() if sampler.sdcpp}
        can = [name for name, sampler in known.items() if self._log.flow or not sampler.flow]
        if job.scheduler and job.scheduler not in can:
            kind = "this model" if job.scheduler in known else "engine sdcpp"
            return InvalidParameter(f"scheduler {job.scheduler}: {kind} can do {', '.join(can)}")
        if job.scheduler == "dpm++_2m_karras" and job.steps == 1:  # the library gives NaN
            return InvalidParameter(f"steps: at least 2 with scheduler {job.scheduler}, got 1")
        return None

    def _model_refusal(self, job: JobSpec) -> FarmError | None:
        """What these files do not have, and sizes."""
        if job.init_image and not self._encoder:
            return InvalidParameter(
                f"{job.kind} needs a VAE encoder, and this model's files have none; "
                "options.vae may name a VAE that has one"
            )
        if job.clip_skip and not (self._clip and clip_skip_of(job, self._log.version)):
            return InvalidParameter("clip_skip: this model has no CLIP layers that can be skipped")
        width, height = (_up(side, self._multiple) for side in (job.width, job.height))
        if (width, height) != (job.width, job.height):
            return InvalidParameter(
                f"size {job.width}x{job.height}: this model takes multiples of {self._multiple}, "
                f"the next is {width}x{height}"
            )
        return None


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple
