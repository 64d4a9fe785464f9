"""Memory of a run over a million rows, all rendered before: the real rows, SQL, gates and writers.

The pictures are tiny, and drawn from their rows' numbers as they are read, so each is its own.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple

from farm.datasets.recipe import Recipe
from farm.datasets.run import run
from farm.png import png
from tests.benchmarks.rendered import Drawn, in_process, open_farm, render
from tests.recipe_kit import Quiet, recipe

COLUMNS = (
    "one process, every picture ready", "rows", "RSS before", "peak", "of 400 MB", "a row",
    "in all",
)  # fmt: skip
AIM_MB = 400
SIDE = 16
NEAR = 10  # times fewer rows; each look goes over all hashes before it
WAYS: dict[str, dict[str, Any]] = {
    "default gates": {},
    "near duplicates too": {"near_duplicates": 4},
}


class Peak(NamedTuple):
    """The most megabytes that there were, as the run began and at its end; its `seconds`."""

    start: float
    end: float
    seconds: float


def dataset_memory(home: Path, rows: int = 1_000_000) -> list[tuple[str, ...]]:
    """Rows of the table of COLUMNS; prompts must be distinct in all of them."""
    table = []
    for number, (way, gates) in enumerate(WAYS.items()):
        n = rows // NEAR if gates else rows
        found = measure(home / str(number), n, gates)
        share, each = found.end / AIM_MB, found.seconds / n * 1e3
        table.append((
            f"webdataset and parquet, {way}", f"{n:,}", f"{found.start:.0f} MB",
            f"{found.end:.0f} MB", f"{share:.0%}", f"{each:.2f} ms", f"{found.seconds:.0f} s",
        ))  # fmt: skip
    return table


def measure(home: Path, rows: int, gates: dict[str, Any]) -> Peak:
    """Of a run over so many rows; `gates`: of its recipe."""
    in_process(_prepare, home, rows, gates)
    return in_process(_run, home, rows, gates)


def picture(row: int) -> bytes:
    """Noise of its own."""
    pixels = hashlib.shake_128(b"%d" % row).digest(SIDE * SIDE * 3)
    return png(pixels, SIDE, SIDE, {})


def _recipe(home: Path, rows: int, gates: dict[str, Any]) -> Recipe:
    lists = {"colour": ["red", "blue"], "n": f"1..{rows // 2}"}
    prompts = {"template": "a {colour} fox in the snow, number {n}", "lists": lists}
    params = {"model": "fake-fast", "width": SIDE, "height": SIDE}
    forms = ("webdataset", "parquet")
    return recipe(
        home, shard_size=1_000, formats=forms, prompts=prompts, params=params, gates=gates,
        filters={"distinct": True},
    )  # fmt: skip


def _prepare(home: Path, rows: int, gates: dict[str, Any]) -> None:
    with open_farm(home, Drawn(picture)) as farm:
        render(farm, _recipe(home, rows, gates), picture)


def _run(home: Path, rows: int, gates: dict[str, Any]) -> Peak:
    whole = _recipe(home, rows, gates)
    with open_farm(home, Drawn(picture)) as farm:
        start, began = _peak_mb(), time.perf_counter()
        summary = run(farm, whole, tell=Quiet())
        seconds = time.perf_counter() - began
    assert summary.counts["accepted"] == rows, summary
    return Peak(start, _peak_mb(), seconds)


def _peak_mb() -> float:
    """The most memory that this process had; getrusage tells its parent's, where that is more."""
    status = Path("/proc/self/status").read_text()
    kib = next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]
    return int(kib) * 1024 / 1e6
