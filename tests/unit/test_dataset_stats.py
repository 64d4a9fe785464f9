"""Stats are read with doubt: what somebody changed in them is no stats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from farm.blobs import open_blobs
from farm.datasets.stats import Stats, json_bytes, read_stats, stats_key

HASH = "0" * 64
GOOD: Stats = {
    "shard": 0,
    "content": HASH,
    "made": {"sizes": {"64x64": 1}},
    "rows": (0, 1),
    "counts": {"accepted": 1},
    "tries": {},
    "failed": {},
    "pictures": [(0, HASH, "mark")],
    "bytes": 10,
    "signed": 0,
    "started_at": "2026-11-25T02:00:00+00:00",
    "finished_at": None,
    "render_s": 0.5,
    "gates": "mark",
    "measures": {HASH: {"std": 9.0, "pixels": "0" * 32, "phash": "f" * 16}},
    "files": [{"key": "webdataset/train-00000.tar", "sha256": HASH, "size": 10}],
}


def read(folder: Path, told: Any) -> Stats | None:
    place = open_blobs(str(folder))
    place.put(stats_key(0), json_bytes(told), "application/json")
    return read_stats(place, stats_key(0))


def test_stats_come_back(tmp_path: Path) -> None:
    assert read_stats(open_blobs(str(tmp_path)), stats_key(0)) is None
    assert read(tmp_path, GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("measures", {HASH: {"pixels": "00"}}),
        ("measures", {HASH: {"pixels": "x" * 32}}),
        ("measures", {HASH: {"phash": "0" * 15}}),
        ("content", "0"),
        ("bytes", -1),
        ("files", [{"key": "../outside", "sha256": HASH, "size": 10}]),
        ("pictures", [[0, "x", "mark"]]),
    ],
)
def test_what_is_none_is_not_taken_for_one(tmp_path: Path, name: str, value: Any) -> None:
    assert read(tmp_path, {**GOOD, name: value}) is None
