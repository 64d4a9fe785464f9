"""What an engine is: load, render, close. And where the engines are found, by name.

An engine turns jobs into pictures and knows nothing of queues, SQL or storage. It is a class that
takes an EngineConfig and has the three methods of `Engine`; one line in ENGINES adds it. It is
imported only in the engine's own process (`workers.child`), so nothing here imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from farm.catalog import Weights
from farm.errors import FarmError, InvalidConfig, ModelNotLoaded
from farm.spec import JobSpec

Pixels = NDArray[np.uint8]
"""One picture: (height, width, 3), red, green, blue."""

Inputs = Mapping[str, bytes]
"""Files of input pictures by their keys in the blob store."""
NO_INPUTS: Inputs = {}

ENGINES: dict[str, str] = {
    "diffusers": "workers.engines.diffusers_engine:DiffusersEngine",
    "fake": "workers.engines.fake_engine:FakeEngine",
    "sdcpp": "workers.engines.sdcpp_engine:SdcppEngine",
}
CUDA_MICRO_BATCH = 4


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine's process needs; picklable.

    `strict`: every micro-batch has the same shape, so that a picture's bytes do not depend on
    what was rendered beside it. `threads`: processor threads, None for the engine's own choice.
    `loras`: the files of those that jobs may name. `memory_limit`: bytes of the device's memory,
    of the process' own on a CPU. `eased`: rungs of Engine.ease to take at once, for an earlier
    process of this lane needed them; `too_large`: pixels that did not fit alone in one.
    `needs_memory`: bytes that the catalogue says the model needs.
    """

    engine: str
    model: str
    weights: Weights
    device: str | None = None
    micro_batch: int | None = None
    strict: bool = False
    threads: int | None = None
    loras: Mapping[str, Path] = field(default_factory=dict)
    memory_limit: int | None = None
    eased: int = 0
    too_large: int | None = None
    needs_memory: int | None = None

    def cap(self, device: str) -> int:
        """The largest micro-batch to begin with: as configured, else 4 on CUDA and 1 elsewhere."""
        by_device = CUDA_MICRO_BATCH if device.startswith("cuda") else 1
        return self.micro_batch or self.weights.micro_batch or by_device


@dataclass(frozen=True)
class EngineInfo:
    """What was loaded. `versions`: package -> version, for the picture's provenance.

    `interruptible`: a render lets the JobCancelled of its Watch through; where native code cannot
    be stopped, the parent ends the process instead, and starts another. `memory`: bytes that the
    engine may use on its device. `loras`: SHA-256 of the file of each LoRA, by name.
    """

    device: str
    micro_batch: int
    weights_sha256: str
    versions: dict[str, str]
    interruptible: bool = True
    memory: int | None = None
    loras: dict[str, str] = field(default_factory=dict)


class Watch(Protocol):
    """How a render in progress is seen, and stopped, from outside."""

    def step(self, done: int, total: int) -> None:
        """To be called after each step, from the thread that called `render`.

        Raises JobCancelled, to be let through, when nobody wants the micro-batch any more.
        """


class NoWatch:
    """Nobody looks: the Watch of an engine's own first picture."""

    def step(self, done: int, total: int) -> None:
        pass


class Engine(Protocol):
    """Made as `TheEngine(config: EngineConfig)`; used from one thread."""

    def load(self) -> EngineInfo:
        """Load the model once. Raises ModelNotLoaded, which names the file that is wrong."""

    def render(
        self, jobs: Sequence[JobSpec], watch: Watch, inputs: Inputs = NO_INPUTS
    ) -> Sequence[Pixels | FarmError]:
        """Render one micro-batch of one compatibility key: a picture or an error for each job.

        `inputs`: the files of the input pictures that the jobs name, by key.
        Raises OutOfMemory (having freed what the attempt held), Invalid or another FarmError, the
        JobCancelled of `watch`, and EngineCrashed if the process can no longer be trusted.
        """

    def ease(self) -> str | None:
        """Make do with less memory from now on, be it slower: what was done, or None: no more can.

        Called after an OutOfMemory with a micro-batch of one.
        """

    def close(self) -> None:
        """Release the model; nothing is called afterwards."""


def create(config: EngineConfig) -> Engine:
    """The engine of that name, not yet loaded.

    Raises InvalidConfig for an unknown name, ModelNotLoaded when its packages are not installed.
    """
    if config.engine not in ENGINES:
        raise InvalidConfig(f"no engine {config.engine!r}, there are: {', '.join(sorted(ENGINES))}")
    module, _, name = ENGINES[config.engine].partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ModelNotLoaded(
            f"engine {config.engine!r} cannot be imported ({error}); "
            f"install it with: pip install 'renderfarm[{config.engine}]'"
        ) from error
    engine: Engine = made(config)
    return engine


def said(error: BaseException) -> str:
    """The type and the first line of an exception; two where the first only announces."""
    lines = str(error).strip().splitlines()
    text = " ".join(line.strip() for line in lines[: 2 if lines and lines[0][-1:] == ":" else 1])
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
