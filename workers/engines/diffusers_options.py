"""What models.toml may say of a model for diffusers beyond dtype and variant, checked.

    [models.sd15.engines.diffusers]
    path = "sd15.safetensors"              # one file of the original layout, or a directory
    [models.sd15.engines.diffusers.options]
    config = "sd15-config"                 # of one file: the pipeline's directory, without weights
    components = { vae = "vae-ft-mse" }    # others in the place of the model's own
    safety_checker = false                 # leave it out
    offload = "model"

A component is a directory as `save_pretrained` writes it, or one .safetensors file. Relative
paths stand inside `path` when that is a directory, else beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import InvalidConfig
from farm.weight_files import PICKLES
from workers.engine import EngineConfig

CHOICES: dict[str, tuple[object, ...]] = {
    "device_map": ("cuda", "balanced", "cpu"),
    "offload": ("none", "model", "sequential"),
    "vae_slicing": (False, True),
    "vae_tiling": (False, True),
    "safety_checker": (False, True),
    "parallel_loading": (False, True),
}
KNOWN = ("components", "config", *CHOICES)
COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,62}")
ONE_FILE = (".safetensors", ".gguf", *PICKLES)


@dataclass(frozen=True)
class DiffusersOptions:
    """`components`: name -> directory or file. `config`: of a checkpoint of one file, else None.

    `device_map`: cuda, balanced over all GPUs, or cpu; None: the worker's device. `offload`: what
    waits in the machine's memory until used: none, whole models, or layers (sequential).
    `safety_checker`: None where nothing is said, which means: where the model has one.
    """

    components: dict[str, Path]
    config: Path | None
    device_map: str | None
    offload: str
    vae_slicing: bool
    vae_tiling: bool
    safety_checker: bool | None
    parallel_loading: bool

    @property
    def device(self) -> str | None:
        """The device that `device_map` is about."""
        return "cuda" if self.device_map == "balanced" else self.device_map

    @property
    def settings(self) -> dict[str, str]:
        """What a picture's pixels depend on, and is not as by default."""
        told = {"vae_slicing": self.vae_slicing, "vae_tiling": self.vae_tiling}
        return {name: str(value) for name, value in told.items() if value}


def options_of(config: EngineConfig) -> DiffusersOptions:
    """Raises InvalidConfig, which names the option and what it may be."""
    options = config.weights.options
    if unknown := sorted(set(options) - set(KNOWN)):
        raise wrong(config, f"has no option {', '.join(unknown)}, it has: {', '.join(KNOWN)}")
    chosen: dict[str, Any] = {name: _choice(config, name) for name in CHOICES}
    made = DiffusersOptions(
        components=_components(config),
        config=_config(config),
        device_map=chosen["device_map"],
        offload=chosen["offload"] or "none",
        vae_slicing=bool(chosen["vae_slicing"]),
        vae_tiling=bool(chosen["vae_tiling"]),
        safety_checker=chosen["safety_checker"],
        parallel_loading=bool(chosen["parallel_loading"]),
    )
    if made.device_map:
        _check_device_map(config, made)
    return made


def wrong(config: EngineConfig, what: str) -> InvalidConfig:
    return InvalidConfig(f"model {config.model}: engine diffusers {what}")


def _choice(config: EngineConfig, name: str) -> object:
    """The value of an option, None where nothing is said."""
    if name not in config.weights.options:
        return None
    may, value = CHOICES[name], config.weights.options[name]
    if type(value) is not type(may[0]) or value not in may:
        known = ", ".join(str(each).lower() for each in may)
        raise wrong(config, f"option {name}: one of {known}; not {str(value)[:60]!r}")
    return value


def _components(config: EngineConfig) -> dict[str, Path]:
    told = config.weights.options.get("components", {})
    if not isinstance(told, dict):
        raise wrong(config, "option components: a table of component = path")
    for name in told:
        if not COMPONENT.fullmatch(name):
            raise wrong(config, f"option components: {name[:60]!r} names no component")
    return {name: _place(config, f"components.{name}", path) for name, path in told.items()}


def _config(config: EngineConfig) -> Path | None:
    """The directory that says what a checkpoint of one file is."""
    path, told = config.weights.path, config.weights.options.get("config")
    if path is None or not (path.is_file() or path.suffix.lower() in ONE_FILE):
        if told is not None:
            raise wrong(config, "option config: only with a path that is one file")
        return None
    if told is None:
        raise wrong(
            config,
            f"needs options.config for {path}: a directory with the pipeline's model_index.json, "
            "configurations and tokenizers, as in the model's repository; weights may be left out",
        )
    if config.weights.variant:
        raise wrong(config, f"has no variant of the one file {path}")
    return _place(config, "config", told)


def _place(config: EngineConfig, option: str, told: object) -> Path:
    if not isinstance(told, str) or not told.strip() or "\0" in told:
        raise wrong(config, f"option {option}: a path; not {str(told)[:60]!r}")
    path = config.weights.path
    if path is None and not Path(told).is_absolute():
        raise wrong(config, f"option {option}: with a repo the path must be absolute, not {told}")
    base = Path() if path is None else path if path.is_dir() else path.parent
    return base / told


def _check_device_map(config: EngineConfig, options: DiffusersOptions) -> None:
    kind = "cpu" if options.device_map == "cpu" else "cuda"
    if config.device and config.device.partition(":")[0] != kind:
        raise wrong(config, f"option device_map: {options.device_map} is not {config.device}")
    for other, given in (
        ("config", options.config is not None),
        ("offload", options.offload != "none"),
        ("components", options.device_map == "balanced" and bool(options.components)),
    ):
        if given:
            raise wrong(config, f"option device_map: {options.device_map} goes without {other}")
