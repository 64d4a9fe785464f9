"""Writing shards: a process' time for each ready picture, beside its hash and a plain copy alone.

The picture is 512x512 as a worker stores it, about 460 KB; a GPU that renders 30 of them a second
leaves 33.3 ms for each. Medians of rounds, after one that imports and warms.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from farm.datasets.formats import FORMATS, open_writer
from farm.datasets.sample import Sample
from farm.png import png

COLUMNS = ("a ready picture into a shard", "CPU", "wall", "CPU of 33.3 ms")
SIDE, KINDS = 512, 20
BUDGET_MS = 1_000 / 30


def shards(home: Path, pictures: int = 200, rounds: int = 3) -> list[tuple[str, ...]]:
    """Rows of the table: the steps alone, each format, all of them in one pass."""
    samples = _samples(pictures)
    size = statistics.mean(len(one.data) for one in samples)
    ways: dict[str, Callable[[], None]] = {
        f"SHA-256 alone, {size / 1e3:.0f} KB": lambda: _hash(samples),
        "a plain file alone": lambda: _plain(home / "plain", samples),
        **{form: _written(home, samples, [form]) for form in FORMATS},
        "all three in one pass": _written(home, samples, FORMATS),
    }
    return [(name, *_timed(way, home, pictures, rounds)) for name, way in ways.items()]


def _samples(pictures: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 255, SIDE)[:, None, None]
    ready = []
    for _ in range(KINDS):
        pixels = np.clip(slope + rng.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        data = png(pixels.tobytes(), SIDE, SIDE, {})
        ready.append((data, hashlib.sha256(data).hexdigest()))
    params = {
        "model": "sdxl", "width": SIDE, "height": SIDE, "steps": 4, "guidance_scale": 4.0,
        "format": "png",
    }  # fmt: skip
    samples = []
    for row in range(pictures):
        data, digest = ready[row % KINDS]
        told = {**params, "prompt": f"a red fox in the snow, number {row}", "seed": row}
        samples.append(Sample(row, data, "png", digest, told))
    return samples


def _hash(samples: Sequence[Sample]) -> None:
    digest = hashlib.sha256()
    for one in samples:
        digest.update(one.data)


def _plain(path: Path, samples: Sequence[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for one in samples:
            file.write(one.data)


def _written(home: Path, samples: Sequence[Sample], forms: Sequence[str]) -> Callable[[], None]:
    def write() -> None:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(open_writer(form, "train-00000", home)) for form in forms
            ]
            for one in samples:
                for writer in writers:
                    writer.add(one)
            for writer in writers:
                assert writer.close()

    return write


def _timed(way: Callable[[], None], home: Path, pictures: int, rounds: int) -> tuple[str, str, str]:
    """CPU ms, wall ms and the share of the budget, for one picture."""
    cpu, wall = [], []
    for _ in range(rounds + 1):
        shutil.rmtree(home, ignore_errors=True)
        began = time.process_time(), time.perf_counter()
        way()
        cpu.append((time.process_time() - began[0]) / pictures * 1e3)
        wall.append((time.perf_counter() - began[1]) / pictures * 1e3)
    cpu_ms, wall_ms = statistics.median(cpu[1:]), statistics.median(wall[1:])
    return f"{cpu_ms:.2f} ms", f"{wall_ms:.2f} ms", f"{cpu_ms / BUDGET_MS:.1%}"
