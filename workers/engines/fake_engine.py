"""The engine of the tests: no model, pictures of coloured noise, and misbehaviour on request.

The first word of a prompt asks for it: !fail raises, !white gives a uniform picture, !oom has no
memory for more jobs than options["oom_above"], !crash aborts, !exit exits, !device reports a
broken device, !hang sleeps for ever, and !grip does so in native code, with Python's lock held.
Other options: seconds_per_step, crash_in_load, hang_in_load, and uninterruptible, which makes it
deaf to a cancel as native code is.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from farm.errors import EngineCrashed, FarmError, OutOfMemory
from farm.spec import JobSpec
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs, Pixels, Watch


class FakeEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options = config.weights.options

    def load(self) -> EngineInfo:
        if self._options.get("crash_in_load"):
            os.abort()
        if self._options.get("hang_in_load"):
            time.sleep(3600)
        weights = hashlib.sha256(self._config.model.encode()).hexdigest()
        versions = {"numpy": version("numpy")}
        interruptible = not self._options.get("uninterruptible")
        return EngineInfo("cpu", self._config.cap("cpu"), weights, versions, interruptible)

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        for step in range(jobs[0].steps):
            time.sleep(self._options.get("seconds_per_step", 0))
            for job in jobs:
                self._misbehave(job.prompt.split()[0], len(jobs))
            if not self._options.get("uninterruptible"):
                watch.step(step + 1, jobs[0].steps)
        return [_picture(job) for job in jobs]

    def ease(self) -> str | None:
        return None

    def close(self) -> None:
        pass

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


def _picture(job: JobSpec) -> Pixels:
    shape = (job.height, job.width, 3)
    if job.prompt.startswith("!white"):
        return np.full(shape, 255, np.uint8)
    digest = hashlib.sha256(job.canonical().encode()).digest()
    noise = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return noise.integers(0, 256, shape, np.uint8)
