"""The engine of the tests: no model, pictures of coloured noise, and misbehaviour on request.

An init image comes back, blended with the noise by the job's strength where the mask is white.
The first word of a prompt asks for misbehaviour: !fail raises, !white gives a uniform picture,
!oom has no memory for more jobs than options["oom_above"], !crash aborts, !exit exits, !device
reports a broken device, !hang sleeps for ever, and !grip does so in native code, with Python's
lock held.
Other options: seconds_per_step, seconds_to_decode, crash_in_load, hang_in_load, and
uninterruptible, which makes it deaf to a cancel as native code is. options["mood"] names a file: as
long as it is there, the engine is a bad one, which treats every job as if the file's word stood
before it; the word !load keeps it from loading. options["fragile"] names a file too: as long as it
is there, jobs fail whose prompt holds the word that it holds.

A micro-batch needs options["bytes_per_pixel"] for each of its pixels, halved by each rung of
`ease`, of which there are options["rungs"]; it has the memory_limit, else options["memory"] bytes.
`ease` takes options["seconds_per_rung"]; it raises with options["ease_fails"], and aborts with
options["ease_crashes"].
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from farm.errors import EngineCrashed, FarmError, ModelNotLoaded, OutOfMemory, RenderFailed
from farm.spec import JobSpec
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs, Pixels, Watch
from workers.engines.input_pictures import init_picture, mask_picture


class FakeEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options = config.weights.options
        self._memory: int | None = config.memory_limit or self._options.get("memory")
        self._eased = config.eased

    def load(self) -> EngineInfo:
        if self._options.get("crash_in_load"):
            os.abort()
        if self._options.get("hang_in_load"):
            time.sleep(3600)
        if self._mood() == "!load":
            raise ModelNotLoaded("asked not to load")
        if self._mood() == "!crash":  # as in the first picture that the others render here
            self._misbehave("!crash", 1)
        weights = hashlib.sha256(self._config.model.encode()).hexdigest()
        versions = {"numpy": version("numpy")}
        interruptible = not self._options.get("uninterruptible")
        cap = self._config.cap("cpu")
        return EngineInfo("cpu", cap, weights, versions, interruptible, self._memory)

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        self._allocate(sum(job.width * job.height for job in jobs))
        if (mood := self._mood()) not in ("", "!load"):
            jobs = [job.model_copy(update={"prompt": f"{mood} {job.prompt}"}) for job in jobs]
        for step in range(jobs[0].steps):
            time.sleep(self._options.get("seconds_per_step", 0))
            for job in jobs:
                self._misbehave(job.prompt.split()[0], len(jobs))
            if not self._options.get("uninterruptible"):
                watch.step(step + 1, jobs[0].steps)
        time.sleep(self._options.get("seconds_to_decode", 0))
        fragile = self._word("fragile")
        return [
            RenderFailed("asked to fail for now")
            if fragile and fragile in job.prompt
            else _picture(job, inputs)
            for job in jobs
        ]

    def ease(self) -> str | None:
        if self._options.get("ease_fails"):
            raise ValueError("asked to fail while easing")
        if self._options.get("ease_crashes"):
            os.abort()
        if self._eased >= self._options.get("rungs", 0):
            return None
        time.sleep(self._options.get("seconds_per_rung", 0))
        self._eased += 1
        return f"rung {self._eased}"

    def close(self) -> None:
        pass

    def _allocate(self, pixels: int) -> None:
        need = pixels * self._options.get("bytes_per_pixel", 0) / 2**self._eased
        if self._memory is not None and need > self._memory:
            raise OutOfMemory(f"{need:g} bytes are more than {self._memory}")

    def _mood(self) -> str:
        return self._word("mood")

    def _word(self, option: str) -> str:
        try:
            return Path(self._options[option]).read_text(encoding="utf-8").strip()
        except (KeyError, FileNotFoundError):
            return ""

    def _misbehave(self, word: str, micro_batch: int) -> None:
        if word == "!fail":
            raise ValueError("asked to fail\nand a second line")
        if word == "!oom" and micro_batch > self._options.get("oom_above", 0):
            raise OutOfMemory(f"no memory for {micro_batch}")
        if word == "!device":
            raise EngineCrashed("the device is broken")
        if word == "!crash":
            print("asked to crash", flush=True)
            os.abort()
        if word == "!exit":
            os._exit(3)
        if word == "!hang":
            time.sleep(3600)
        if word == "!grip":
            ctypes.PyDLL(None).sleep(3600)


def _picture(job: JobSpec, inputs: Inputs) -> Pixels:
    shape = (job.height, job.width, 3)
    if job.prompt.startswith("!white"):
        return np.full(shape, 255, np.uint8)
    digest = hashlib.sha256(job.canonical().encode()).digest()
    noise = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return _blended(noise.integers(0, 256, shape, np.uint8), job, inputs)


def _blended(noise: Pixels, job: JobSpec, inputs: Inputs) -> Pixels:
    init, mask = init_picture(job, inputs), mask_picture(job, inputs)
    if init is None or job.strength is None:
        return noise
    share = job.strength * (np.asarray(mask)[:, :, None] / 255 if mask else 1)
    blend = np.asarray(init) * (1 - share) + noise * share
    return np.asarray(blend.round(), np.uint8)
