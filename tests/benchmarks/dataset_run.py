"""The whole way of a shard: a dataset's run in one process, every row rendered before.

Pictures are 512x512 as workers store them, in a local directory, or 20 of them in memory, again and
again; a GPU that renders 30 a second leaves 33.3 ms for each. Each run is a fresh process, timed
from its imports on: the rows read again and compared, SQL, pictures fetched and hashed, shards
written, hashed and synced into their place, card and manifest. Steps run in several threads, so
they may sum up to more.

Memory is warmed first, for a virtual machine may have to fetch it from its host page by page, at
several times the price of what is measured. The bare loop reads the same files, hashes each, and
appends it to one file that is hashed and synced: no writer of checked pictures can do without that.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from farm.blobs.local import LocalBlobs
from farm.datasets import finish
from farm.datasets.batches import Batches
from farm.datasets.formats import FORMATS, open_writer
from farm.datasets.recipe import Recipe
from farm.datasets.run import run
from farm.datasets.settle import Settler
from farm.datasets.shards import Shards
from farm.png import png
from farm.service import Farm
from tests.benchmarks.rendered import in_process, open_farm, render
from tests.benchmarks.shards import BUDGET_MS, SIDE
from tests.recipe_kit import Quiet, recipe

COLUMNS = (
    "one process, no gates unless told", "wall", "CPU", "wall of 33.3 ms", "bare loops", "its steps"
)  # fmt: skip
KINDS, SHARD, OUT = 20, 1_000, "out"
WARM = 3 * 500_000  # bytes a picture: read, written, and some more
UNGATED = {"blank": False, "exact_duplicates": False}
READY = ", pictures in memory"
BARE = "a bare loop"
WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    **{f"{form}{READY}": ((form,), UNGATED) for form in FORMATS},
    **{form: ((form,), UNGATED) for form in FORMATS},
    "webdataset and parquet": (("webdataset", "parquet"), UNGATED),
    "webdataset, default gates": (("webdataset",), {}),
}
STEPS = {
    "rows and batch": (Batches, "main"),
    "SQL": (Batches, "jobs"),
    "gates": (Settler, "settle"),
    "fetch": (Farm, "fetch"),
    "shard": (Shards, "_write"),
    "move and sync": (LocalBlobs, "put_files"),
    "told": (Shards, "_told"),
    "end": (finish, "finish"),
}


def dataset_run(home: Path, pictures: int = 1_000, rounds: int = 3) -> list[tuple[str, ...]]:
    """Rows of the table of COLUMNS: medians of interleaved rounds."""
    in_process(_prepare, home, pictures)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in (BARE, *WAYS)}
    for _ in range(rounds):
        for way in found:
            do = _bare if way == BARE else _run
            found[way].append(in_process(do, home, way, pictures))
            shutil.rmtree(home / OUT)  # gigabytes of it would fill the page cache
    return [_row(way, some, found[BARE]) for way, some in found.items()]


def _row(name: str, some: list[dict[str, float]], bare: list[dict[str, float]]) -> tuple[str, ...]:
    ratio = statistics.median(a["wall"] / b["wall"] for a, b in zip(some, bare, strict=True))
    told = {key: statistics.median(one[key] for one in some) for key in some[0]}
    wall, cpu = told.pop("wall"), told.pop("CPU")
    steps = ", ".join(f"{step} {ms:.2f}" for step, ms in told.items())
    return (
        name, f"{wall:.2f} ms", f"{cpu:.2f} ms", f"{wall / BUDGET_MS:.1%}", f"{ratio:.2f}", steps
    )  # fmt: skip


def _recipe(home: Path, pictures: int, **told: Any) -> Recipe:
    lists = {"colour": ["red", "blue"], "n": f"1..{pictures // 2}"}
    prompts = {"template": "a {colour} fox in the snow, number {n}", "lists": lists}
    params = {"model": "fake-fast", "width": SIDE, "height": SIDE, "guidance_scale": 4.0}
    return recipe(home, shard_size=SHARD, prompts=prompts, params=params, **told)


def _prepare(home: Path, pictures: int) -> None:
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 255, SIDE)[:, None, None]
    kinds = [
        np.clip(slope + rng.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        for _ in range(KINDS)
    ]

    def picture(row: int) -> bytes:
        pixels = kinds[row % KINDS]
        pixels[0, 0] = row % 256, row // 256, 0  # each its own
        return png(pixels.tobytes(), SIDE, SIDE, {})

    with open_farm(home) as farm:
        render(farm, _recipe(home, pictures), picture)


def _run(home: Path, way: str, pictures: int) -> dict[str, float]:
    """Milliseconds a picture: wall, CPU of all threads, and of each step."""
    forms, gates = WAYS[way]
    for form in forms:
        open_writer(form, "import", home)
    told = _recipe(home, pictures, formats=forms, gates=gates, out=OUT)
    took: Counter[str] = Counter()
    for step, (owner, name) in STEPS.items():
        setattr(owner, name, _timed(getattr(owner, name), step, took))
    with open_farm(home) as farm:
        if way.endswith(READY):
            ready = [farm.blobs.get(one.key) for one in islice(farm.blobs.list(), KINDS)]
            Farm.fetch = lambda self, job: ready[job.idx % KINDS]  # type: ignore[method-assign]
        _warm(pictures)
        began = time.perf_counter(), time.process_time()
        summary = run(farm, told, tell=Quiet())
        took["wall"] = time.perf_counter() - began[0]
        took["CPU"] = time.process_time() - began[1]
    assert summary.counts["accepted"] == pictures, summary
    return {step: took[step] / pictures * 1e3 for step in ("wall", "CPU", *STEPS)}


def _bare(home: Path, way: str, pictures: int) -> dict[str, float]:
    with open_farm(home) as farm:
        assert isinstance(farm.blobs, LocalBlobs)
        paths = [farm.blobs.root / one.key for one in farm.blobs.list()]
    assert len(paths) == pictures
    (home / OUT).mkdir()
    _warm(pictures)
    began, whole = (time.perf_counter(), time.process_time()), hashlib.sha256()
    with (home / OUT / "all").open("wb") as file:
        for path in paths:
            data = path.read_bytes()
            hashlib.sha256(data).digest()
            whole.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    return {"wall": wall / pictures * 1e3, "CPU": cpu / pictures * 1e3}


def _warm(pictures: int) -> None:
    """Touch what the page cache will need, and let go of it."""
    pages = b"x" * (pictures * WARM)
    del pages


def _timed(way: Callable[..., Any], step: str, took: Counter[str]) -> Callable[..., Any]:
    lock = threading.Lock()

    @functools.wraps(way)
    def timed(*args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return way(*args, **more)
        finally:
            with lock:
                took[step] += time.perf_counter() - began

    return timed
