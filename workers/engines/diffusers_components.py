"""Components from elsewhere in the place of a pipeline's own: a better VAE, a text encoder.

Each is a directory as `save_pretrained` writes it, or one .safetensors file, for which the
pipeline's own directory says what the component is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file

from farm.errors import InvalidConfig, ModelNotLoaded
from workers.engine import EngineConfig
from workers.engines.checkpoint_files import check_checkpoint
from workers.engines.diffusers_options import DiffusersOptions, wrong
from workers.engines.model_files import Index, component_files, read_json

CHECKER = "safety_checker"


def replacements(config: EngineConfig, options: DiffusersOptions, index: Index) -> dict[str, Path]:
    """Component -> where it comes from instead of the pipeline's own directory.

    With a checkpoint of one file that is the safety checker too, which such files never hold.
    Raises InvalidConfig for components that the pipeline does not have.
    """
    found = dict(options.components)
    if unknown := sorted(set(found) - set(index.components)):
        known = ", ".join(index.components)
        raise wrong(config, f"option components: no {', '.join(unknown)} in {index.file}: {known}")
    has_checker = CHECKER in index.components
    if options.safety_checker and not has_checker:
        raise wrong(config, f"option safety_checker: {index.file} names none; leave the option out")
    if options.safety_checker is False:
        found.pop(CHECKER, None)
    elif has_checker and options.config:
        found.setdefault(CHECKER, options.config / CHECKER)
    return found


def left_out(options: DiffusersOptions, index: Index) -> dict[str, Any]:
    """Arguments with which a pipeline of `index` is made without what is not wanted."""
    if options.safety_checker is not False or CHECKER not in index.components:
        return {}
    parameters = inspect.signature(pipeline_class(index).__init__).parameters
    silent = {"requires_safety_checker": False}
    return {CHECKER: None, **(silent if "requires_safety_checker" in parameters else {})}


def pipeline_class(index: Index) -> Any:
    """Raises ModelNotLoaded for one that diffusers does not have."""
    found = getattr(diffusers, index.pipeline, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ModelNotLoaded(f"{index.file}: diffusers has no pipeline {index.pipeline}")
    return found


def files_of(name: str, place: Path, index: Index, variant: str | None) -> dict[str, Path]:
    """The files of a component from elsewhere, checked, as if they stood in the pipeline's own.

    Raises ModelNotLoaded, which names the file, and InvalidConfig where no place is.
    """
    if place.is_dir():
        files = component_files(place, index.components[name][1], variant)
        return {f"{name}/{file.relative_to(place).as_posix()}": file for file in files}
    if place.suffix != ".safetensors":
        what = "is not there" if not place.exists() else "is neither directory nor .safetensors"
        raise InvalidConfig(f"component {name}: {place} {what}")
    check_checkpoint(place)
    return {f"{name}/{place.name}": place}


def load_component(
    name: str, place: Path, index: Index, dtype: torch.dtype, variant: str | None
) -> Any:
    """The component in `place`, its files checked before."""
    kind: Any = _class(index, name, place)
    if place.is_dir():
        if not issubclass(kind, torch.nn.Module):
            return kind.from_pretrained(place, local_files_only=True)
        has_variant = variant and any(f".{variant}." in file.name for file in place.iterdir())
        return kind.from_pretrained(
            place,
            dtype=dtype,
            variant=variant if has_variant else None,
            use_safetensors=True,
            local_files_only=True,
        )
    return _from_file(kind, index.file.parent / name, place, dtype)


def _from_file(kind: Any, told: Path, file: Path, dtype: torch.dtype) -> Any:
    """`told`: the directory of the pipeline's own component, which has its config.json."""
    if hasattr(kind, "from_single_file"):
        load: Callable[..., Any] = kind.from_single_file
        return load(
            str(file),
            config=str(told.parent),
            subfolder=told.name,
            dtype=dtype,
            local_files_only=True,
        )
    if not issubclass(kind, transformers.PreTrainedModel):
        raise InvalidConfig(f"component {told.name}: {kind.__name__} needs a directory, not {file}")
    config = kind.config_class.from_pretrained(told, local_files_only=True)
    return kind.from_pretrained(None, config=config, state_dict=load_file(file), dtype=dtype)


def _class(index: Index, name: str, place: Path) -> type:
    """What the component itself says it is, else the pipeline's index.

    Only of diffusers and transformers: a model's own code is never run.
    """
    library, kind = index.components[name]
    libraries = {"diffusers": diffusers, "transformers": transformers}
    module = libraries.get(library) or getattr(diffusers.pipelines, library, None)
    if module is diffusers and (place / "config.json").is_file():
        kind = str(read_json(place / "config.json").get("_class_name", kind))
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        raise ModelNotLoaded(f"{index.file}: {name}: neither library has a {library}.{kind}")
    return found


def take_any_dtype(pipeline: Any) -> None:
    """Let a VAE of another dtype than the rest have its input in its own, and tell in theirs.

    The pipelines hand latents over in the dtype of the denoiser, and most fail on any other, also
    on what the VAE encodes. Those of SDXL would give the VAE the denoiser's dtype for good after
    they encoded (`force_upcast`), rounding its weights.
    """
    vae = getattr(pipeline, "vae", None)
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    if vae is None or denoiser is None or vae.dtype == denoiser.dtype:
        return

    def cast(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda given, *args, **kwargs: method(given.to(vae.dtype), *args, **kwargs)

    encode = cast(vae.encode)

    def encode_for_all(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        if told := getattr(output, "latent_dist", None):
            output.latent_dist = type(told)(told.parameters.to(denoiser.dtype))
        elif hasattr(output, "latents"):  # the tiny VAEs
            output.latents = output.latents.to(denoiser.dtype)
        return output

    vae.decode, vae.encode = cast(vae.decode), encode_for_all
    if getattr(vae.config, "force_upcast", False):
        vae.register_to_config(force_upcast=False)
