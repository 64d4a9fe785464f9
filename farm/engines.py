"""Which engines can run on this machine: told by their packages, without importing any."""

from __future__ import annotations

import importlib.util

from farm.catalog import Catalog, Lane
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
    """The lane that `model` or `model:engine` means: the model's first engine that is installed.

    Raises UnknownModel, or InvalidConfig when no engine for it is installed.
    """
    model, colon, engine = name.partition(":")
    lanes = [Lane(model, engine)] if colon else [Lane(model, e) for e in catalog.get(model).engines]
    for lane in lanes:
        catalog.weights(lane)
    for lane in lanes:
        if not missing_packages(lane.engine):
            return lane
    check_engine(lanes[0].engine)
    return lanes[0]
