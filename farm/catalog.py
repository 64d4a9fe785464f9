"""The model catalogue: one name, one licence, and weights for one or more engines.

The demo model is built in; a models.toml adds others:

    [models.sdxl-base]
    licence = "openrail++"
    defaults = { width = 1024, height = 1024, steps = 30, guidance_scale = 5.0 }
    [models.sdxl-base.engines.diffusers]
    repo = "stabilityai/stable-diffusion-xl-base-1.0"     # or: path = "/models/sdxl"
    revision = "462165984030d82259a11f4367a4eed129e94a7b"
    dtype = "float16"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from farm.demo import SHAPES_DIR
from farm.errors import InvalidConfig, UnknownModel
from farm.spec import NAME_PATTERN, canonical_scheduler

EngineName = Literal["diffusers", "sdcpp", "fake"]


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

    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    micro_batch: Annotated[int, Field(ge=1, le=256)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # CPU threads; None: the engine's
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Weights:
        if self.path and self.repo:
            raise ValueError("give path or repo, not both")
        return self


class Defaults(_Entry):
    """What a job gets where it says nothing."""

    width: int = 512
    height: int = 512
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None


class ModelEntry(_Entry):
    """One model of the catalogue."""

    licence: str
    description: str = ""
    attribution: str = ""
    defaults: Defaults = Defaults()
    max_side: Annotated[int, Field(ge=16, le=8192)] = 4096
    max_steps: Annotated[int, Field(ge=1, le=500)] = 500
    schedulers: tuple[str, ...] = ()  # allowed ones; none named: all
    engines: Annotated[dict[EngineName, Weights], Field(min_length=1)]

    @model_validator(mode="after")
    def _known_schedulers(self) -> ModelEntry:
        for name in (*self.schedulers, *filter(None, [self.defaults.scheduler])):
            canonical_scheduler(name)
        return self

    def refusals(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Fields of a valid job that this model cannot do -> what was expected."""
        bad: dict[str, str] = {}
        for side in ("width", "height"):
            if params[side] > self.max_side:
                bad[side] = f"at most {self.max_side} pixels for this model"
        if params["steps"] > self.max_steps:
            bad["steps"] = f"at most {self.max_steps} for this model"
        if params["scheduler"] and self.schedulers and params["scheduler"] not in self.schedulers:
            bad["scheduler"] = f"one of {', '.join(self.schedulers)} for this model"
        return bad


DEMO = ModelEntry(
    licence="apache-2.0",
    description="coloured shapes on coloured backgrounds, 64x64; ships with the farm",
    defaults=Defaults(width=64, height=64, steps=6, guidance_scale=2.0),
    max_side=64,
    engines={"diffusers": Weights(path=SHAPES_DIR, dtype="float32", micro_batch=8, threads=1)},
)


class Catalog:
    """The models by name, the demo model `shapes` among them."""

    def __init__(self, models: Mapping[str, ModelEntry]) -> None:
        self.models = dict(models)

    def get(self, name: str) -> ModelEntry:
        """Raises UnknownModel, which names those that exist."""
        if name not in self.models:
            near = difflib.get_close_matches(name, self.models, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(sorted(self.models))
            raise UnknownModel(f"no model {name[:80]!r} in the catalogue, there are: {known}{hint}")
        return self.models[name]

    def lanes(self) -> list[Lane]:
        return [Lane(name, engine) for name, m in self.models.items() for engine in m.engines]

    def weights(self, lane: Lane) -> Weights:
        """Raises UnknownModel when the model has no weights for the lane's engine."""
        engines = self.get(lane.model).engines
        found = {str(name): weights for name, weights in engines.items()}
        if lane.engine not in found:
            raise UnknownModel(
                f"model {lane.model} has no weights for engine {lane.engine!r}, only for: "
                + ", ".join(found)
            )
        return found[lane.engine]


class _File(_Entry):
    models: dict[Annotated[str, Field(pattern=NAME_PATTERN)], ModelEntry] = {}


def load_catalog(path: Path | None = None) -> Catalog:
    """The built-in demo model and the entries of a models.toml (relative paths: beside the file).

    Raises InvalidConfig with the file, the entry and what is wrong.
    """
    models = {"shapes": DEMO}
    if path is None:
        return Catalog(models)
    try:
        parsed = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(p) for p in item['loc'])}: {item['msg']}"
            for item in error.errors(include_url=False, include_context=False)
        ]
        raise InvalidConfig(f"{path}: " + "; ".join(lines)) from None
    for name, entry in parsed.models.items():
        engines = {
            engine: weights.model_copy(update={"path": (path.parent / weights.path).resolve()})
            if weights.path
            else weights
            for engine, weights in entry.engines.items()
        }
        models[name] = entry.model_copy(update={"engines": engines})
    return Catalog(models)
