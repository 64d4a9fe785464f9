"""From a directory or a hub id to a pipeline on its device, with every file checked first."""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models import modeling_utils
from huggingface_hub.utils.tqdm import disable_progress_bars
from tqdm import tqdm  # type: ignore[import-untyped]

from farm.errors import InvalidConfig, ModelNotLoaded
from farm.weight_files import PICKLES
from workers.engine import EngineConfig, said
from workers.engines.checkpoint_files import check_checkpoint
from workers.engines.diffusers_components import (
    files_of,
    left_out,
    load_component,
    pipeline_class,
    replacements,
    take_any_dtype,
)
from workers.engines.diffusers_memory import Easing, limit_to
from workers.engines.diffusers_options import DiffusersOptions, options_of
from workers.engines.model_files import Index, checked_files, manifest_sha256, read_index

FEWEST_TOKENS = 32
"""A tokenizer whose files were not found has two tokens."""


@dataclass(frozen=True)
class Loaded:
    """`memory`: bytes that the engine may use on its device."""

    pipeline: Any  # a DiffusionPipeline
    device: torch.device
    weights_sha256: str
    memory: int
    easing: Easing


def load(config: EngineConfig) -> Loaded:
    """The pipeline of the config's weights. Raises ModelNotLoaded or InvalidConfig."""
    options = options_of(config)
    _quieten()
    device = _device(config.device or options.device)
    memory = limit_to(config.memory_limit, device, options)
    source = _source(config, options)
    dtypes = Dtypes(config.weights.dtype, "float32" if device.type == "cpu" else "float16")
    easing = Easing(device, options, config.strict)
    try:
        pipeline = _pipeline(source, dtypes)
        easing.place(pipeline, config.eased)
    except (ModelNotLoaded, InvalidConfig):
        raise
    except Exception as error:
        raise ModelNotLoaded(f"{source.place}: {said(error)}{_hint(error)}") from error
    return Loaded(pipeline, device, manifest_sha256(source.files, options.settings), memory, easing)


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
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidConfig(f"device {name!r}: {said(error)}") from None
    return device


def _place(config: EngineConfig) -> Path:
    """The model's directory or file; a hub id is fetched into the hub's own cache (HF_HOME)."""
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


@dataclass(frozen=True)
class Dtypes:
    """`wanted`: one dtype by its name, or one by component; `default` where nothing is said."""

    wanted: str | dict[str, Any] | None
    default: str

    def of(self, component: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, self._names().get(component, self._names()["default"]))
        return found

    def for_pipeline(self) -> Any:
        """As diffusers takes them."""
        names = self._names()
        return {part: getattr(torch, name) for part, name in names.items()}

    def _names(self) -> dict[str, str]:
        if isinstance(self.wanted, dict):
            return {"default": self.default, **self.wanted}
        return {"default": self.wanted or self.default}

    @property
    def one(self) -> torch.dtype | None:
        """That of all components, if it is the same."""
        names = set(self._names().values())
        return self.of("default") if len(names) == 1 else None


@contextmanager
def _parallel(wanted: bool) -> Iterator[None]:
    """Read the shards of a component in threads: HF_ENABLE_PARALLEL_LOADING of diffusers.

    It reads that variable when it is imported, long before a model's options are known.
    """
    before = modeling_utils.HF_ENABLE_PARALLEL_LOADING
    modeling_utils.HF_ENABLE_PARALLEL_LOADING = wanted or before
    try:
        yield
    finally:
        modeling_utils.HF_ENABLE_PARALLEL_LOADING = before


def _check_one_file(file: Path, allow_pickle: bool) -> None:
    """Raises ModelNotLoaded for what is no whole checkpoint, or would be one that runs code."""
    if file.suffix.lower() in PICKLES and allow_pickle:
        if not file.is_file():
            raise ModelNotLoaded(f"{file}: missing, or not a regular file")
    elif file.suffix.lower() != ".safetensors":
        raise ModelNotLoaded(f"{file}: engine diffusers reads one file only as .safetensors")
    else:
        check_checkpoint(file)


def dtype_told(pipeline: Any) -> str:
    """The dtype of all models, or of each: "text_encoder float32, unet bfloat16"."""
    found = {name: str(part.dtype).removeprefix("torch.") for name, part in _modules(pipeline)}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(found.items()))


def _hint(error: BaseException | None) -> str:
    """What to do about some failures whose own words do not tell, by them and their causes."""
    while error:
        text = said(error)
        if "meta tensor" in text:
            return "; tensors are missing"
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if no_memory or "annot allocate memory" in text or "DefaultCPUAllocator" in text:
            return (
                "; the memory does not suffice for the model: raise memory_limit, take a smaller "
                'dtype, or on a GPU options.offload = "model"'
            )
        error = error.__cause__ or error.__context__
    return ""


@dataclass(frozen=True)
class _Source:
    """`place`: the directory, or the checkpoint of one file. `files`: all, checked, by name."""

    place: Path
    index: Index
    variant: str | None
    options: DiffusersOptions
    replaced: dict[str, Path]
    files: dict[str, Path]


def _source(config: EngineConfig, options: DiffusersOptions) -> _Source:
    place, variant = _place(config), config.weights.variant
    index = read_index(options.config or place)
    replaced = replacements(config, options, index)
    absent = {**replaced, **left_out(options, index)}
    files = checked_files(index, variant, absent, weights=options.config is None)
    if options.config:
        _check_one_file(place, config.weights.allow_pickle)
        files["checkpoint"] = place
    for name, path in replaced.items():
        files |= files_of(name, path, index, variant)
    return _Source(place, index, variant, options, replaced, files)


def _pipeline(source: _Source, dtypes: Dtypes) -> Any:
    options = source.options
    complaints = _Complaints()
    library_log = logging.getLogger("transformers")
    library_log.addHandler(complaints)
    try:
        given = left_out(options, source.index) | {
            name: load_component(name, path, source.index, dtypes.of(name), source.variant)
            for name, path in source.replaced.items()
        }
        with _parallel(options.parallel_loading):
            pipeline = (_from_file if options.config else _from_directory)(source, dtypes, given)
    finally:
        library_log.removeHandler(complaints)
    if complaints.missing:
        raise ModelNotLoaded(f"{source.place}: tensors are missing, {complaints.missing}")
    _check_parts(source, pipeline)
    take_any_dtype(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_directory(source: _Source, dtypes: Dtypes, given: dict[str, Any]) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(
        source.place,
        dtype=dtypes.for_pipeline(),
        variant=source.variant,
        use_safetensors=True,
        local_files_only=True,
        device_map=source.options.device_map,
        **given,
    )


def _from_file(source: _Source, dtypes: Dtypes, given: dict[str, Any]) -> Any:
    """From a checkpoint of one file: a safetensors file of the original authors' layout."""
    kind = pipeline_class(source.index)
    if not hasattr(kind, "from_single_file"):
        raise InvalidConfig(f"{source.place}: {kind.__name__} is not loaded from one file")
    pipeline = kind.from_single_file(
        str(source.place),
        config=str(source.index.file.parent),
        dtype=dtypes.one or torch.float32,
        local_files_only=True,
        **given,
    )
    for name, part in _modules(pipeline):
        if name not in given and part.dtype != dtypes.of(name):
            part.to(dtypes.of(name))
    return pipeline


def _modules(pipeline: Any) -> list[tuple[str, torch.nn.Module]]:
    parts = pipeline.components.items()
    return [(name, part) for name, part in parts if isinstance(part, torch.nn.Module)]


def _check_parts(source: _Source, pipeline: Any) -> None:
    folder = source.index.file.parent
    for name, part in pipeline.components.items():
        if isinstance(part, transformers.PreTrainedTokenizerBase) and len(part) < FEWEST_TOKENS:
            raise ModelNotLoaded(f"{folder / name}: a tokenizer of only {len(part)} tokens")
    for name, part in _modules(pipeline):
        where = source.replaced.get(name) or (
            source.place if source.options.config else folder / name
        )
        for key, parameter in part.named_parameters():
            if parameter.is_meta:
                raise ModelNotLoaded(f"{where}: tensor {key} of {name} is missing")


class _Complaints(logging.Handler):
    """Keeps what transformers only logs: tensors not in the file, which it then makes up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.missing = ""

    def emit(self, record: logging.LogRecord) -> None:
        lines = [line.strip() for line in record.getMessage().splitlines()]
        self.missing += "; ".join(line for line in lines if "MISSING" in line and "|" in line)
