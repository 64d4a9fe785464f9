"""What a loaded pipeline may use of its device's memory, and how it makes do with less.

The micro-batch that a CUDA device holds is measured when the model is loaded: the peaks of one
picture and of two tell what each further one takes.
"""

from __future__ import annotations

import ctypes
import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from farm.errors import InvalidConfig, OutOfMemory
from workers.engine import EngineConfig
from workers.engines.diffusers_options import DiffusersOptions
from workers.engines.memory_limit import limit_memory

MOST_MEASURED = 16
"""The largest micro-batch by measurement: beyond it a GPU gains little, and cancels wait."""
SPARE = 0.1
"""Part of the free memory that stays free: allocators leave gaps, and others use the device."""


def limit_to(limit: int | None, device: torch.device, options: DiffusersOptions) -> int:
    """Keep this process to `limit` bytes of its device; returns what it may use, in bytes.

    A CPU's limit counts all that this process has, Python and torch (about 0.4 GB) included.
    Raises InvalidConfig where there is no such limit.
    """
    if device.type != "cuda":
        return limit_memory(limit)
    spread = range(torch.cuda.device_count()) if options.device_map == "balanced" else [device]
    total = 0
    for each in spread:
        whole = torch.cuda.get_device_properties(each).total_memory
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), each)
        total += whole if limit is None else min(limit, whole)
    return total


def give_back() -> None:
    """Return what is free within the allocators of Python, torch and the C library."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc alone
        trim(0)


class Easing:
    """Where the parts of a pipeline are, and the rungs by which it takes less of its device.

    The rungs, each only where it helps: the VAE works picture by picture and in tiles (never in
    strict mode, for the pixels change a little); then whole models, then single layers wait in the
    machine's memory until they are used (only with a GPU, the pixels stay). They are the same for
    the same config, so the first n taken by one process can be taken by the next at once.
    """

    def __init__(self, device: torch.device, options: DiffusersOptions, strict: bool) -> None:
        if options.offload != "none" and device.type != "cuda":
            raise InvalidConfig(f"option offload: {options.offload} needs a GPU, this is {device}")
        self._device, self._options, self._strict = device, options, strict
        self._pipe: Any = None
        self._left: deque[Callable[[], str]] = deque()
        self._offload = "none"

    def place(self, pipeline: Any, rungs: int) -> None:
        """Bring a pipeline that was just loaded to its device, with so many rungs taken.

        Raises InvalidConfig for an option that the pipeline cannot follow.
        """
        self._pipe = pipeline
        for name, wanted in (
            ("slicing", self._options.vae_slicing),
            ("tiling", self._options.vae_tiling),
        ):
            if wanted and not self._vae(name):
                raise InvalidConfig(f"option vae_{name}: {type(pipeline).__name__} has none")
        if self._options.offload != "none":
            self._offload_to(self._options.offload)
        self._left = deque(self._rungs())
        for _ in range(rungs):
            self.ease()
        if self._options.device_map is None and self._offload == "none":
            pipeline.to(self._device)
        elif self._options.components and self._offload == "none":
            for name in self._options.components:  # diffusers maps only what it loads itself
                if isinstance(part := getattr(pipeline, name), torch.nn.Module):
                    part.to(self._device)

    def ease(self) -> str | None:
        """Take the next rung: what was done, in a few words, or None when there is none left."""
        return self._left.popleft()() if self._left else None

    def told(self) -> dict[str, str]:
        """How the pipeline now differs from one on its device, for the pictures' provenance."""
        vae = getattr(self._pipe, "vae", None)
        names = ("slicing", "tiling")
        found = {f"vae_{name}": "true" for name in names if getattr(vae, f"use_{name}", False)}
        return found | ({"offload": self._offload} if self._offload != "none" else {})

    def _rungs(self) -> list[Callable[[], str]]:
        rungs: list[Callable[[], str]] = []
        vae = getattr(self._pipe, "vae", None)
        if not self._strict and getattr(vae, "use_tiling", None) is False:
            rungs.append(self._tiles)
        if self._device.type == "cuda" and self._options.device_map is None:
            if self._offload == "none" and self._pipe.model_cpu_offload_seq:
                rungs.append(self._models_wait)
            if self._offload != "sequential":
                rungs.append(self._layers_wait)
        return rungs

    def _tiles(self) -> str:
        self._vae("slicing")
        self._vae("tiling")
        return "the VAE works picture by picture and in tiles"

    def _models_wait(self) -> str:
        self._offload_to("model")
        return "models wait in the machine's memory until they are used"

    def _layers_wait(self) -> str:
        self._offload_to("sequential")
        return "layers wait in the machine's memory until they are used"

    def _offload_to(self, kind: str) -> None:
        enable = f"enable_{kind}_cpu_offload"
        getattr(self._pipe, enable)(device=self._device)
        self._offload = kind

    def _vae(self, name: str) -> bool:
        """Switch slicing or tiling on; False: this VAE has none."""
        vae = getattr(self._pipe, "vae", None)
        if not hasattr(vae, f"use_{name}"):
            return False
        getattr(vae, f"enable_{name}")()
        return True


# -------------------------------------------------------------------- the micro-batch
def first_cap(config: EngineConfig, device: torch.device, render: Callable[[int], object]) -> int:
    """The micro-batch to begin with: as configured, else measured on CUDA, and 1 elsewhere.

    `render`: renders so many pictures of the model's own size at once. In strict mode nothing is
    measured: a picture's bytes depend on the micro-batch's size, and free memory varies.
    """
    told = config.micro_batch or config.weights.micro_batch
    if told or config.strict or device.type != "cuda":
        return config.cap(str(device))
    free = _free(device, config.memory_limit)
    return measured_cap(lambda n: _peak(device, lambda: render(n)), free)


def measured_cap(peak: Callable[[int], int], free: int, ceiling: int = MOST_MEASURED) -> int:
    """The cap by the peaks, in bytes, of one picture and of two; `peak` may raise OutOfMemory."""
    try:
        return cap_from(peak(1), peak(2), free, ceiling)
    except OutOfMemory:
        return 1


def cap_from(peak_one: int, peak_two: int, free: int, ceiling: int) -> int:
    """How many pictures fit at once into `free` bytes, if one takes `peak_one` and so on.

    A second that takes next to nothing (a VAE that works picture by picture hides it) is counted
    with a part of the first, so that `ceiling` pictures take twice as much as one.
    """
    each = max(peak_two - peak_one, -(-peak_one // ceiling), 1)
    fitting = 1 + int(free * (1 - SPARE) - peak_one) // each
    return max(1, min(ceiling, fitting))


def default_side(pipe: Any) -> int:
    """The side in pixels of the pictures that a model was made for; 512 where it does not tell."""
    unet = getattr(pipe, "unet", None)
    latent = getattr(pipe, "default_sample_size", None) or (unet and unet.config.sample_size)
    scale = getattr(pipe, "vae_scale_factor", None)
    return latent * scale if isinstance(latent, int) and isinstance(scale, int) else 512


def _peak(device: torch.device, render: Callable[[], object]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    render()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _free(device: torch.device, limit: int | None) -> int:
    """Bytes that this process can still have."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    return free if limit is None else min(free, limit - torch.cuda.memory_allocated(device))
