"""A diffusers engine loaded from a tiny pipeline, with options as models.toml has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from farm.catalog import Weights
from farm.errors import FarmError
from farm.spec import JobSpec
from workers.engine import EngineConfig, EngineInfo, Pixels
from workers.engines.diffusers_engine import DiffusersEngine


class NoWatch:
    def step(self, done: int, total: int) -> None:
        pass


def job(side: int = 64, **params: Any) -> JobSpec:
    plain = {"prompt": "a red cat", "steps": 2, "guidance_scale": 3.0, "seed": 5}
    return JobSpec(model="tiny", width=side, height=side, **{**plain, **params})


def config(path: Path, weights: dict[str, Any] | None = None, **settings: Any) -> EngineConfig:
    """`settings` not of EngineConfig are options of the weights."""
    of_config = ("strict", "memory_limit", "eased", "device", "micro_batch")
    options = {name: settings.pop(name) for name in list(settings) if name not in of_config}
    told = Weights(path=path, options=options, **(weights or {}))
    return EngineConfig("diffusers", "tiny", told, threads=1, **settings)


class Loaded:
    """An engine and what its load told."""

    def __init__(self, path: Path, weights: dict[str, Any] | None = None, **settings: Any) -> None:
        self.engine = DiffusersEngine(config(path, weights, **settings))
        self.info: EngineInfo = self.engine.load()

    @property
    def pipe(self) -> Any:
        return self.engine._pipe

    def result(self, **params: Any) -> Pixels | FarmError:
        return self.engine.render([job(**params)], NoWatch())[0]

    def picture(self, **params: Any) -> Pixels:
        result = self.result(**params)
        assert isinstance(result, np.ndarray), result
        return result
