"""From a directory or a hub id to a pipeline on its device, with every file checked first."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars

from farm.errors import InvalidConfig, ModelNotLoaded
from workers.engine import EngineConfig, said
from workers.engines.model_files import checked_files, manifest_sha256

FEWEST_TOKENS = 32
"""A tokenizer whose files were not found has two tokens."""


@dataclass(frozen=True)
class Loaded:
    pipeline: Any  # a DiffusionPipeline
    device: torch.device
    weights_sha256: str


def load(config: EngineConfig) -> Loaded:
    """The pipeline of the config's weights. Raises ModelNotLoaded or InvalidConfig."""
    if config.weights.options:
        unknown = ", ".join(sorted(config.weights.options))
        raise InvalidConfig(f"model {config.model}: engine diffusers has no option {unknown}")
    _quieten()
    device = _device(config.device)
    folder = _folder(config)
    files = checked_files(folder, config.weights.variant)
    try:
        pipeline = _pipeline(config, folder, device)
    except ModelNotLoaded:
        raise
    except Exception as error:
        raise ModelNotLoaded(f"{folder}: {said(error)}") from error
    _check_parts(folder, pipeline)
    return Loaded(pipeline, device, manifest_sha256(folder, files))


def versions() -> dict[str, str]:
    """What a picture's pixels depend on besides the weights."""
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _quieten() -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidConfig(f"device {name!r}: {said(error)}") from None
    return device


def _folder(config: EngineConfig) -> Path:
    """The model's directory; a hub id is fetched into the hub's own cache (HF_HOME and so on)."""
    weights = config.weights
    if weights.path:
        return weights.path
    if not weights.repo:
        raise InvalidConfig(f"model {config.model}: its weights have neither path nor repo")
    try:
        return Path(
            diffusers.DiffusionPipeline.download(
                weights.repo,
                revision=weights.revision,
                variant=weights.variant,
                use_safetensors=True,
            )
        )
    except Exception as error:
        at = f"@{weights.revision}" if weights.revision else ""
        raise ModelNotLoaded(
            f"repo {weights.repo}{at}: neither fetched from the hub nor found in its cache; check "
            f"the name, the revision, the network and, for a gated model, HF_TOKEN ({said(error)})"
        ) from error


def _pipeline(config: EngineConfig, folder: Path, device: torch.device) -> Any:
    default = "float32" if device.type == "cpu" else "float16"
    complaints = _Complaints()
    library_log = logging.getLogger("transformers")
    library_log.addHandler(complaints)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder,
            dtype=_dtype(config.weights.dtype, default),
            variant=config.weights.variant,
            use_safetensors=True,
            local_files_only=True,
        )
    finally:
        library_log.removeHandler(complaints)
    if complaints.missing:
        raise ModelNotLoaded(f"{folder}: tensors are missing, {complaints.missing}")
    for name, part in _modules(pipeline):
        for key, parameter in part.named_parameters():
            if parameter.is_meta:
                raise ModelNotLoaded(f"{folder / name}: tensor {key} is missing")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _dtype(wanted: str | dict[str, Any] | None, default: str) -> Any:
    """One dtype, or one by component, as diffusers takes them."""
    if isinstance(wanted, dict):
        names = {"default": default, **wanted}
        return {part: getattr(torch, name) for part, name in names.items()}
    return getattr(torch, wanted or default)


def _modules(pipeline: Any) -> list[tuple[str, torch.nn.Module]]:
    parts = pipeline.components.items()
    return [(name, part) for name, part in parts if isinstance(part, torch.nn.Module)]


def _check_parts(folder: Path, pipeline: Any) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, transformers.PreTrainedTokenizerBase) and len(part) < FEWEST_TOKENS:
            raise ModelNotLoaded(f"{folder / name}: a tokenizer of only {len(part)} tokens")


class _Complaints(logging.Handler):
    """Keeps what transformers only logs: tensors not in the file, which it then makes up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.missing = ""

    def emit(self, record: logging.LogRecord) -> None:
        lines = [line.strip() for line in record.getMessage().splitlines()]
        self.missing += "; ".join(line for line in lines if "MISSING" in line and "|" in line)
