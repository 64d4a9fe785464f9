"""Which engines can run on this machine: told by their packages, without importing any."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from farm.catalog import Catalog, Lane, Weights
from farm.errors import InvalidConfig

PACKAGES = {
    "diffusers": ("torch", "diffusers", "transformers"),
    "sdcpp": ("stable_diffusion_cpp",),
}


def missing_packages(engine: str) -> list[str]:
    """Packages of an engine that are not installed; nothing is imported."""
    return [name for name in PACKAGES.get(engine, ()) if importlib.util.find_spec(name) is None]


def check_engine(engine: str) -> None:
    """Raises InvalidConfig when an engine's packages are not installed."""
    if missing := missing_packages(engine):
        raise InvalidConfig(
            f"the engine {engine} needs {', '.join(missing)}: pip install 'renderfarm[{engine}]'"
        )


def choose_lane(catalog: Catalog, name: str) -> Lane:
    """The lane that `model` or `model:engine` means.

    Of a model's engines the first that is installed, if need be with weights yet to be fetched.
    Raises UnknownModel, or InvalidConfig when no engine for it is installed.
    """
    lanes = _lanes_of(catalog, name)
    away = {lane for lane in lanes if not _is_here(catalog.weights(lane))}
    able = [lane for lane in lanes if not missing_packages(lane.engine)]
    if not able:
        check_engine(lanes[0].engine)
    return min(able, key=away.__contains__)


def lanes_here(catalog: Catalog, names: Sequence[str], engine: str | None = None) -> list[Lane]:
    """The lanes that this machine can serve now: installed engines, weights that are here.

    `names`: only these, as `model` or `model:engine`. Raises UnknownModel, or InvalidConfig when
    none is left.
    """
    asked = {lane for name in names for lane in _lanes_of(catalog, name)}
    found = [
        lane
        for lane in catalog.lanes()
        if (lane in asked or not names)
        and engine in (None, lane.engine)
        and not missing_packages(lane.engine)
        and _is_here(catalog.weights(lane))
    ]
    if not found:
        raise InvalidConfig("none of these models can be served here; see: farm models")
    return found


def _lanes_of(catalog: Catalog, name: str) -> list[Lane]:
    model, colon, engine = name.partition(":")
    lanes = [Lane(model, engine)] if colon else [Lane(model, e) for e in catalog.get(model).engines]
    for lane in lanes:
        catalog.weights(lane)
    return lanes


def _is_here(weights: Weights) -> bool:
    return weights.path is not None or not (weights.repo or weights.url)
