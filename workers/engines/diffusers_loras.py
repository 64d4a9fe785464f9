"""LoRAs on a loaded pipeline: added by name, weighted for each micro-batch, never fused.

A LoRA (https://arxiv.org/abs/2106.09685) stays beside the weights as an adapter of peft, so
switching it off gives the model's own pictures back, byte for byte; fusing and unfusing would
damage them. A file that is broken or of another family spoils the jobs that name it, no others.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from farm.errors import EngineCrashed, InvalidParameter, ModelNotLoaded, OutOfMemory
from farm.weight_files import sha256_of
from workers.engine import said
from workers.engines.checkpoint_files import check_checkpoint
from workers.engines.diffusers_failures import translated

MOST_LOADED = 16
"""So many are kept beside the model; the one not used for longest makes room."""


class Loras:
    """The LoRAs that jobs may name. `sha256`: of each file that is whole, by name."""

    def __init__(self, pipe: Any, files: Mapping[str, Path]) -> None:
        self._pipe, self._files = pipe, files
        self._faults: dict[str, str] = {}
        self._loaded: list[str] = []  # the last used stands last
        self._active: Sequence[tuple[str, float]] | None = ()  # None: in between
        self.sha256: dict[str, str] = {}
        for name, file in files.items():
            try:
                if file.suffix != ".safetensors":
                    raise ModelNotLoaded(f"{file}: not a .safetensors file")
                check_checkpoint(file)
                self.sha256[name] = sha256_of(file)
            except (ModelNotLoaded, OSError) as error:
                self._faults[name] = str(error)

    def use(self, wanted: Sequence[tuple[str, float]]) -> None:
        """Let these work, by name and weight, and no others. A weight of 0 is none at all.

        Raises InvalidParameter, which names the LoRA and what is wrong with it.
        """
        for name, _ in wanted:
            self._check(name)
        active = [(name, weight) for name, weight in wanted if weight]
        if active == self._active:
            return
        self._active = None
        if self._loaded:
            self._pipe.disable_lora()
        if active:
            for name, _ in active:
                self._add(name)
            self._pipe.enable_lora()
            adapters = [_adapter(name) for name, _ in active]
            self._pipe.set_adapters(adapters, [weight for _, weight in active])
        self._active = active

    def _check(self, name: str) -> None:
        if not hasattr(self._pipe, "load_lora_weights"):
            raise InvalidParameter(f"loras: {type(self._pipe).__name__} of diffusers takes none")
        if name not in self._files:
            raise InvalidParameter(f"loras: this worker has no file of {name}; fetch it, restart")
        if name in self._faults:
            raise InvalidParameter(f"loras: {name} cannot be used, {self._faults[name]}")

    def _add(self, name: str) -> None:
        """Load it if it is not, as the last used."""
        if name in self._loaded:
            self._loaded.remove(name)
        else:
            if len(self._loaded) >= MOST_LOADED:
                self._drop(_adapter(self._loaded.pop(0)))
            self._load(name)
        self._loaded.append(name)

    def _load(self, name: str) -> None:
        file, adapter = self._files[name], _adapter(name)
        try:
            with _Complaints() as complaints, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's: that there are several
                self._pipe.load_lora_weights(
                    str(file.parent),
                    weight_name=file.name,
                    adapter_name=adapter,
                    local_files_only=True,
                    use_safetensors=True,
                )
            fault = complaints.unexpected or self._fault(adapter)
        except Exception as error:
            if isinstance(translated(error), OutOfMemory | EngineCrashed):  # not the file's fault
                self._drop(adapter)
                raise
            fault = said(error)
        if fault:
            self._drop(adapter)
            self._faults[name] = f"{file.name} does not fit the model: {fault}"
            self._check(name)

    def _fault(self, adapter: str) -> str | None:
        """What is wrong with an adapter that was loaded without complaint."""
        values = [
            parameter
            for part in self._parts()
            for key, parameter in part.named_parameters()
            if f".{adapter}." in key
        ]
        if not values:
            return "none of its layers is in the model, it is for another family"
        if not all(bool(value.isfinite().all()) for value in values if not value.is_meta):
            return "it has NaN or infinite values"
        return None

    def _drop(self, adapter: str) -> None:
        """Take away all of it, also what a load that failed half-way has left."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's: that another is the active one now
            for part in self._parts():
                for module in part.modules():
                    if isinstance(module, BaseTunerLayer):
                        module.delete_adapter(adapter)
                getattr(part, "peft_config", {}).pop(adapter, None)

    def _parts(self) -> list[torch.nn.Module]:
        parts = self._pipe.components.values()
        return [part for part in parts if isinstance(part, torch.nn.Module)]


def _adapter(name: str) -> str:
    """A name for peft, which cannot be that of an attribute of torch's modules."""
    return f"lora_{name}"


class _Complaints(logging.Handler):
    """Keeps what diffusers only logs: layers of a LoRA that the model does not have."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.unexpected = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "unexpected keys" in text:
            self.unexpected = text[:300]

    def __enter__(self) -> _Complaints:
        logging.getLogger("diffusers").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("diffusers").removeHandler(self)
