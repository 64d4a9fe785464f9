"""stable-diffusion.cpp behind its Python binding 0.4.7, with the binding's traps closed.

- A model that does not load leaves a context that is NULL, whose release is a crash: told here.
- Each picture's buffers are freed, which the binding forgets.
- A progress callback goes with every call, for the library keeps the last one for ever. What it
  raises would be swallowed: it is kept, and raised when the call is over.
- What the library says of a failure is kept from its log.
- A prompt is text: the binding would open the files that "<lora:...>" in it names.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the library is loaded:
# threads that spin while they wait make a render on a busy machine 2 to 6 times slower
os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a debugger's words would hide why it aborted
import stable_diffusion_cpp as library

from farm.errors import ModelNotLoaded, OutOfMemory, RenderFailed
from farm.weight_files import sha256_of
from workers.engine import Pixels
from workers.engines.sdcpp_options import SdcppOptions

PACKAGE = "stable-diffusion-cpp-python"
INFO, WARNING, ERROR = 1, 2, 3  # sd_log_level_t; 0 is for debugging
MOST_COMPLAINTS = 40
LORA_TAKEN = re.compile(r"\((\d+) / \d+\) LoRA tensors have been applied, lora_file_path = (.*)")

_free = ctypes.CDLL(None).free
_free.argtypes, _free.restype = [ctypes.c_void_p], None


class Log:
    """The library's log: what matters goes to the process' stderr, errors are kept.

    `backend`: what it computes on, such as CPU or CUDA0. `flow`: a flow-matching model.
    `version`: what the library takes the model for, such as "SD 1.x". `taken`: tensors that the
    last render took of each LoRA's file.
    """

    def __init__(self) -> None:
        self.least, self.backend, self.version, self.flow = INFO, "", "", False
        self.taken: Counter[str] = Counter()
        self.complaints: deque[str] = deque(maxlen=MOST_COMPLAINTS)
        self._callback = library.sd_log_callback(self._take)
        library.sd_set_log_callback(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, data: object) -> None:
        line = text.decode("utf-8", "replace").rstrip()
        if found := re.search(r"Initializing backend: (\w+)", line):
            self.backend = found.group(1)
        if found := re.search(r"- Version: (.+)", line):
            self.version = found.group(1)
        if line.endswith("FLOW mode"):
            self.flow = True
        if found := LORA_TAKEN.search(line):
            self.taken[found.group(2)] += int(found.group(1))
        if level >= ERROR:
            self.complaints.append(re.sub(r"^\S+:\d+\s+- ", "", line))
        if level >= self.least and "unused lora tensor" not in line:  # of each, in each render
            print(line[:2000], file=sys.stderr, flush=True)

    def said(self) -> str:
        """The first complaints since the last time, and how many more there were."""
        said = list(dict.fromkeys(self.complaints))
        self.complaints.clear()
        more = f" (and {len(said) - 2} more)" if len(said) > 2 else ""
        return ("; ".join(said[:2]) or "no reason was given") + more


class Context(library.StableDiffusion):  # type: ignore[misc]
    """One model in memory."""

    def __init__(self, options: SdcppOptions, log: Log, *, encoder: bool) -> None:
        self._taken: list[Pixels] = []
        self._loras: Mapping[Path, float] = {}
        self._log = log
        where = ", ".join(map(str, options.files.values()))
        log.complaints.clear()
        try:
            super().__init__(**options.library(encoder=encoder))
        except (ValueError, UnicodeError) as error:
            raise ModelNotLoaded(f"{where}: {error}") from error
        if not self._model.model:
            self._model.model = None  # its release would crash
            raise ModelNotLoaded(f"{where}: {log.said()}")
        log.least = WARNING
        logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # else a word on the CPU each time

    def render(
        self, progress: Callable[[int, int], None], loras: Mapping[Path, float], **arguments: Any
    ) -> Pixels:
        """One picture; `progress` is called with (steps done, steps).

        `loras`: files with weights; what was taken of each stands in the log's `taken` then.
        Raises what `progress` raised, OutOfMemory or RenderFailed.
        """
        raised: list[Exception] = []

        def on_progress(step: int, steps: int, seconds: float) -> None:
            if not raised:
                try:
                    progress(step, steps)
                except Exception as error:
                    raised.append(error)

        self._taken, self._loras = [], loras
        self._log.complaints.clear()
        self._log.taken.clear()
        self.generate_image(**arguments, batch_count=1, progress_callback=on_progress)
        taken, self._taken = self._taken, []
        if raised:
            raise raised[0]
        if not taken:
            said = self._log.said()
            raise (OutOfMemory if "alloc" in said else RenderFailed)(f"no picture came: {said}")
        return taken[0]

    def _extract_and_build_loras(self, prompt: str, folder: str) -> tuple[str, Any, int, list[Any]]:
        """In place of the binding's: those of the call, whatever the prompt says.

        Returns the prompt, a C array of LoRAs, their number, and what must outlive the call.
        """
        paths = [ctypes.create_string_buffer(os.fsencode(path)) for path in self._loras]
        array = (library.sd_lora_t * len(paths))()
        for entry, path, weight in zip(array, paths, self._loras.values(), strict=True):
            entry.multiplier = weight
            entry.path = ctypes.cast(path, ctypes.c_char_p)
        return prompt, array, len(paths), paths

    def _sd_image_t_p_to_images(self, images: Any, count: int, upscale: int) -> list[Any]:
        """In place of the binding's: copies the pixels, and frees what the library allocated."""
        for number in range(count if images else 0):
            image = images[number]
            if image.data:
                shape = (image.height, image.width, image.channel)
                whole = np.ctypeslib.as_array(image.data, shape)
                self._taken.append(np.array(whole[..., :3], dtype=np.uint8, order="C"))
                _free(ctypes.cast(image.data, ctypes.c_void_p))
        if images:
            _free(ctypes.cast(images, ctypes.c_void_p))
        return []


@cache
def build() -> dict[str, str]:
    """The build: its package, the library file's SHA-256 (16 digits), the instructions it uses."""
    told = library.sd_get_system_info().decode()
    used = sorted(re.findall(r"(\w+) = 1\b", told))
    digest = sha256_of(Path(library.stable_diffusion_cpp._lib._name))
    return {PACKAGE: version(PACKAGE), "build": digest[:16], "cpu": " ".join(used)}
