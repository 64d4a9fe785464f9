"""Three hundred small renders in one engine process: one load, and memory that stays as it is."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from farm.catalog import Weights
from farm.demo import SHAPES_DIR
from farm.demo.run import prompts
from farm.engines import missing_packages
from farm.spec import JobSpec
from workers.child import Child
from workers.engine import EngineConfig
from workers.messages import Failed, Rendered

WARM_UP = 30
COLUMNS = (
    "one process", "loads", "first", "second", "median", f"RSS after {WARM_UP}", "at the end",
    "growth", "slope a picture",
)  # fmt: skip
SPEC: dict[str, Any] = {
    "model": "m", "width": 64, "height": 64, "steps": 4, "guidance_scale": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """`seconds`: of each render; `rss`: bytes of the engine's process after each of them.

    `loads`: processes that rendered, each of which had loaded the model once.
    """

    seconds: list[float]
    rss: list[int]
    loads: int
    warm_up: int = WARM_UP

    @property
    def growth(self) -> float:
        """Of the memory from the warm-up to the end, as a fraction."""
        return self.rss[-1] / self.rss[self.warm_up - 1] - 1

    @property
    def slope(self) -> float:
        """Bytes a picture after the warm-up, by least squares."""
        warm = self.rss[self.warm_up - 1 :]
        return float(np.polyfit(np.arange(len(warm)), np.array(warm, dtype=float), 1)[0])


def memory(home: Path, pictures: int) -> list[tuple[str, ...]]:
    """Rows of the table of COLUMNS, one for each engine that is installed."""
    rows = []
    for engine in COPIES:
        if missing_packages(engine):
            print(f"left out, for it is not installed: {engine}")
            continue
        found = measure(engine, home / engine, pictures)
        times = (*found.seconds[:2], statistics.median(found.seconds))
        sizes = (found.rss[found.warm_up - 1], found.rss[-1])
        rows.append((
            f"{engine}, {pictures} of 64x64 in {SPEC['steps']} steps", str(found.loads),
            *(f"{seconds:.4f} s" for seconds in times),
            *(f"{size / 2**20:.1f} MiB" for size in sizes),
            f"{found.growth:+.2%}", f"{found.slope / 2**10:+.2f} KiB",
        ))  # fmt: skip
    return rows


def measure(engine: str, home: Path, pictures: int, warm_up: int = WARM_UP) -> Memory:
    """Render one picture after the other in one process, whose model's files are gone meanwhile.

    So all of them come from the one load. Raises AssertionError when a picture fails.
    """
    seconds, rss, pids = [], [], set()
    with _loaded(engine, home) as child:
        for seed, prompt in enumerate(prompts(pictures)):
            for event in child.render([JobSpec(**SPEC, prompt=prompt, seed=seed)]):
                assert not isinstance(event, Failed), event
                if isinstance(event, Rendered):
                    seconds.append(event.seconds)
            rss.append(psutil.Process(child.pid).memory_info().rss)
            pids.add(child.pid)
    return Memory(seconds, rss, len(pids), warm_up)


@contextmanager
def _loaded(engine: str, home: Path) -> Iterator[Child]:
    """A child with a copy of the model in memory, the copy's files removed."""
    home.mkdir(parents=True)
    place = COPIES[engine](home)
    config = EngineConfig(engine, "m", Weights(path=place), device="cpu", threads=1)
    child = Child(config, log=home / "log")
    try:
        child.start()
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        yield child
    finally:
        child.close()


def _klein(home: Path) -> Path:
    from tests.sdcpp_models import klein

    return Path(shutil.copy(klein(), home / "klein.safetensors"))


def _shapes(home: Path) -> Path:
    return shutil.copytree(SHAPES_DIR, home / "shapes")


COPIES: dict[str, Callable[[Path], Path]] = {"sdcpp": _klein, "diffusers": _shapes}
