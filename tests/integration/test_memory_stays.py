"""One load serves many renders, and an engine's memory does not grow with them."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.benchmarks.memory import Memory, measure

PICTURES, WARM_UP = 60, 20
MOST_SLOPE = 64 * 2**10
"""Bytes a picture; measured are less than 4 KiB, and the floats of one picture are 48 KiB."""


def test_sixty_pictures_of_one_load(tmp_path: Path) -> None:
    found = measure("diffusers", tmp_path / "home", PICTURES, WARM_UP)
    assert (len(found.seconds), found.loads) == (PICTURES, 1)
    first, *later = found.seconds
    assert statistics.median(later) < 2 * first + 0.5
    assert found.slope < MOST_SLOPE, found.rss


def test_a_leak_would_be_seen() -> None:
    rss = [10_000 * n for n in range(10)] + [100_000 + 500 * n for n in range(31)]
    found = Memory([0.1] * 41, rss, loads=1, warm_up=11)
    assert found.slope == pytest.approx(500)
    assert found.growth == pytest.approx(0.15)
