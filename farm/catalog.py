"""The model catalogue: one name, one licence, and weights for one or more engines.

The demo model is built in; a models.toml adds others:

    [models.sdxl-base]
    licence = "openrail++"
    defaults = { width = 1024, height = 1024, steps = 30, guidance_scale = 5.0 }
    [models.sdxl-base.engines.diffusers]
    repo = "stabilityai/stable-diffusion-xl-base-1.0"     # or: path = "/models/sdxl"
    revision = "462165984030d82259a11f4367a4eed129e94a7b"
    dtype = "float16"                                     # or: { default = ..., vae = ... }

    [loras.pixel-art]                                     # what jobs may add, by this name
    licence = "mit"
    models = ["sdxl-base"]
    weights = { path = "pixel-art.safetensors" }

`farm models fetch` puts a repo's or url's files below the directory of the setting models_dir,
beside a note of where they came from; load_catalog then gives that copy as `path`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from farm.demo import SHAPES_DIR
from farm.errors import InvalidConfig, UnknownModel
from farm.faults import sentence, unreadable
from farm.samplers import canonical_scheduler
from farm.spec import NAME_PATTERN
from farm.weight_files import PICKLES

EngineName = Literal["diffusers", "sdcpp", "fake"]
Dtype = Literal["float32", "float16", "bfloat16"]
Family = Literal[
    "sd1", "sdxl", "sd-turbo", "sd3", "flux", "flux2-klein", "qwen-image", "z-image", "other"
]
Scheduler = Annotated[str, AfterValidator(canonical_scheduler)]
NOTE = ".fetched.json"
"""Beside fetched files: {"source": what Weights.source said, "files": the names, ...}."""
_REPO = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$"
_COMPONENT = r"^[a-z][a-z0-9_]{0,62}$"
LORA = "lora"
"""In the place of an engine: Lane(NAME, LORA) stands for the file of the LoRA of that name."""


class Lane(NamedTuple):
    """One model on one engine."""

    model: str
    engine: str

    @property
    def queue(self) -> str:
        """The Celery queue that holds this lane's tokens."""
        return f"render.{self.model}.{self.engine}"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Weights(_Entry):
    """Where an engine finds a model's weights, and how it loads them."""

    path: Path | None = None  # a directory or one file of this machine
    repo: Annotated[str, Field(pattern=_REPO)] | None = None  # of the hub
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$")] | None = None
    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+/\S*[^\s/]$")] | None = None  # one file
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # of the url's file
    files: tuple[str, ...] = ()  # fetch only files of the repo that match one of these (fnmatch)
    allow_pickle: bool = False
    variant: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_]+$")] | None = None
    dtype: Dtype | Annotated[dict[str, Dtype], Field(min_length=1)] | None = None  # or by component
    micro_batch: Annotated[int, Field(ge=1, le=256)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # CPU threads; None: the engine's
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Weights:
        given = [name for name in ("path", "repo", "url") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not both")
        if self.url and not self.sha256:
            raise ValueError("a url needs the sha256 of its file")
        for name, of in (("sha256", "url"), ("revision", "repo"), ("files", "repo")):
            if getattr(self, name) and not getattr(self, of):
                raise ValueError(f"{name} goes with {of} only")
        if self.file_name.endswith(PICKLES) and not self.allow_pickle:
            raise ValueError("pickled weights may run code; allow_pickle = true takes them")
        return self

    @model_validator(mode="after")
    def _components(self) -> Weights:
        for name in self.dtype if isinstance(self.dtype, dict) else ():
            if not re.match(_COMPONENT, name):
                raise ValueError(f"dtype: {name[:80]!r} names no component")
        return self

    @property
    def file_name(self) -> str:
        """The last part of the url or path; empty for a repo."""
        if self.url:
            return PurePosixPath(unquote(urlsplit(self.url).path)).name
        return self.path.name if self.path else ""

    @property
    def source(self) -> dict[str, Any]:
        """Where the files come from and which they are; equal for the same files."""
        keys = {"repo", "revision", "url", "sha256", "files", "variant", "allow_pickle"}
        return self.model_dump(mode="json", include=keys, exclude_defaults=True)


class Defaults(_Entry):
    """What a job gets where it says nothing."""

    width: int = 512
    height: int = 512
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: Scheduler | None = None


class ModelEntry(_Entry):
    """One model of the catalogue."""

    licence: str
    licence_url: str = ""
    terms: str = ""  # what the licence asks of those who use the model, in a sentence
    description: str = ""
    attribution: str = ""
    family: Family = "other"
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # GB of the device
    defaults: Defaults = Defaults()
    max_side: Annotated[int, Field(ge=16, le=8192)] = 4096
    sizes: tuple[Annotated[str, Field(pattern=r"^[1-9]\d{1,3}x[1-9]\d{1,3}$")], ...] = ()
    min_steps: Annotated[int, Field(ge=1, le=500)] = 1
    max_steps: Annotated[int, Field(ge=1, le=500)] = 500
    min_guidance: Annotated[float, Field(ge=0, le=100)] = 0.0
    max_guidance: Annotated[float, Field(ge=0, le=100)] = 100.0
    schedulers: tuple[Scheduler, ...] = ()  # allowed ones; none named: all
    engines: Annotated[dict[EngineName, Weights], Field(min_length=1)]

    @model_validator(mode="after")
    def _within_limits(self) -> ModelEntry:
        for size in self.sizes:
            if max(map(int, size.split("x"))) > self.max_side:
                raise ValueError(f"sizes: {size} is beyond max_side, {self.max_side}")
        if self.min_steps > self.max_steps or self.min_guidance > self.max_guidance:
            raise ValueError("a least value (min_) is above the largest (max_)")
        given = self.defaults.model_dump()
        for name, expected in self.refusals(given).items():
            raise ValueError(f"defaults.{name}: {given[name]} is not {expected}")
        return self

    def refusals(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Fields of a valid job that this model cannot do -> what was expected."""
        bad: dict[str, str] = {}
        for side in ("width", "height"):
            if params[side] > self.max_side:
                bad[side] = f"at most {self.max_side} pixels for this model"
        if not bad and self.sizes and f"{params['width']}x{params['height']}" not in self.sizes:
            bad["width"] = f"width x height of one of {', '.join(self.sizes)} for this model"
        steps, guidance = params["steps"], params["guidance_scale"]
        if steps > self.max_steps:
            bad["steps"] = f"at most {self.max_steps} for this model"
        if steps < self.min_steps:
            bad["steps"] = f"at least {self.min_steps} for this model"
        if not self.min_guidance <= guidance <= self.max_guidance:
            span = f"from {self.min_guidance:g} to {self.max_guidance:g}"
            bad["guidance_scale"] = f"{span} for this model"
        if params["scheduler"] and self.schedulers and params["scheduler"] not in self.schedulers:
            bad["scheduler"] = f"one of {', '.join(self.schedulers)} for this model"
        return bad


_OF_LORA = {"path", "repo", "revision", "url", "sha256", "files"}


class LoraEntry(_Entry):
    """A LoRA: one file of low-rank changes (https://arxiv.org/abs/2106.09685) to some models."""

    licence: str
    licence_url: str = ""
    terms: str = ""
    description: str = ""
    attribution: str = ""
    models: Annotated[tuple[str, ...], Field(min_length=1)]  # those that it fits
    weights: Weights

    @model_validator(mode="after")
    def _one_file(self) -> LoraEntry:
        told = self.weights.model_dump(exclude_defaults=True)
        if not {"path", "repo", "url"} & set(told):
            raise ValueError("weights: give path, repo or url")
        if extra := sorted(set(told) - _OF_LORA):
            raise ValueError(f"weights: a LoRA has no {', '.join(extra)}")
        name = self.weights.file_name
        if name and not name.lower().endswith(".safetensors"):
            raise ValueError(f"weights: a LoRA is one .safetensors file, not {name}")
        return self


DEMO = ModelEntry(
    licence="apache-2.0",
    description="coloured shapes on coloured backgrounds, 64x64; ships with the farm",
    defaults=Defaults(width=64, height=64, steps=6, guidance_scale=2.0),
    max_side=64,
    engines={"diffusers": Weights(path=SHAPES_DIR, dtype="float32", micro_batch=8, threads=1)},
)


class Catalog:
    """The models by name, the demo model `shapes` among them, and the LoRAs by name."""

    def __init__(
        self, models: Mapping[str, ModelEntry], loras: Mapping[str, LoraEntry] | None = None
    ) -> None:
        self.models = dict(models)
        self.loras = dict(loras or {})

    def get(self, name: str) -> ModelEntry:
        """Raises UnknownModel, which names those that exist."""
        if name not in self.models:
            raise _unknown("model", name, self.models)
        return self.models[name]

    def entry(self, name: str) -> ModelEntry | LoraEntry:
        """The model or LoRA of that name. Raises UnknownModel."""
        found: dict[str, ModelEntry | LoraEntry] = {**self.models, **self.loras}
        if name not in found:
            raise _unknown("model or LoRA", name, found)
        return found[name]

    def lanes(self) -> list[Lane]:
        return [Lane(name, engine) for name, m in self.models.items() for engine in m.engines]

    def loras_for(self, model: str) -> dict[str, LoraEntry]:
        """Those that a job of this model may name."""
        return {name: lora for name, lora in self.loras.items() if model in lora.models}

    def weights(self, lane: Lane) -> Weights:
        """Raises UnknownModel when the model has no weights for the lane's engine."""
        if lane.engine == LORA and lane.model in self.loras:
            return self.loras[lane.model].weights
        engines = self.get(lane.model).engines
        found = {str(name): weights for name, weights in engines.items()}
        if lane.engine not in found:
            raise UnknownModel(
                f"model {lane.model} has no weights for engine {lane.engine!r}, only for: "
                + ", ".join(found)
            )
        return found[lane.engine]


def _unknown(what: str, name: str, known: Collection[str]) -> UnknownModel:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    names = ", ".join(sorted(known))
    return UnknownModel(f"no {what} {name[:80]!r} in the catalogue, there are: {names}{hint}")


class _File(_Entry):
    models: dict[Annotated[str, Field(pattern=NAME_PATTERN)], ModelEntry] = {}
    loras: dict[Annotated[str, Field(pattern=NAME_PATTERN)], LoraEntry] = {}


def load_catalog(path: Path | None = None, models_dir: Path | None = None) -> Catalog:
    """The built-in demo model and the entries of a models.toml (relative paths: beside the file).

    With `models_dir`, weights that were fetched into it come as the `path` of that copy.
    Raises InvalidConfig with the file, the entry and what is wrong.
    """
    models = {"shapes": DEMO}
    if path is None:
        return Catalog(models)
    try:
        told = parsed(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: {unreadable(error)}") from None

    def found(lane: Lane, weights: Weights) -> Weights:
        place = (path.parent / weights.path).resolve() if weights.path else None
        if place is None and models_dir is not None:
            place = local_path(models_dir, lane, weights)
        return located(weights, place) if place else weights

    for name, entry in told.models.items():
        engines = {e: found(Lane(name, e), weights) for e, weights in entry.engines.items()}
        models[name] = entry.model_copy(update={"engines": engines})
    loras = {
        name: lora.model_copy(update={"weights": found(Lane(name, LORA), lora.weights)})
        for name, lora in told.loras.items()
    }
    return Catalog(models, loras)


def parsed(text: str, path: Path) -> _File:
    """The entries in the text of the models.toml at `path`. Raises InvalidConfig."""
    try:
        told = _File.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"{path}: {error}") from error
    except ValidationError as error:
        lines = map(sentence, error.errors(include_url=False, include_context=False))
        raise InvalidConfig(f"{path}: " + "; ".join(lines)) from None
    models = {*told.models, "shapes"}
    for name, lora in told.loras.items():
        if name in models:
            raise InvalidConfig(f"{path}: loras.{name}: a model has this name already")
        if unknown := sorted(set(lora.models) - models):
            raise InvalidConfig(
                f"{path}: loras.{name}.models: no model {', '.join(unknown)} in the catalogue"
            )
    return told


def located(weights: Weights, path: Path) -> Weights:
    """The same weights, found at `path`."""
    gone = {"repo": None, "revision": None, "url": None, "sha256": None, "files": ()}
    return weights.model_copy(update={**gone, "path": path})


def local_path(models_dir: Path, lane: Lane, weights: Weights) -> Path | None:
    """Where `farm models fetch` put these very weights: the one file, else their directory.

    None when they were not fetched, or from another source than the catalogue names now.
    """
    place = models_dir / lane.model / lane.engine
    try:
        told = json.loads((place / NOTE).read_bytes())
        if told["source"] != weights.source:
            return None
        names = list(told["files"])
        return place / names[0] if len(names) == 1 else place
    except (OSError, ValueError, LookupError, TypeError):
        return None
