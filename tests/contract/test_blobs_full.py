"""A local blob store whose disk is full or read-only: pictures are held, and stored later."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from farm.blobs.local import LocalBlobs
from farm.config import Settings
from farm.pictures import Origin
from tests.servers import poll
from tests.store_kit import LANE, Kit, spec
from workers.keeper import Keeper
from workers.recorder import Recorder
from workers.spool import Spool

PIXELS = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
SIZE = 256 * 2**10


def _run(*words: str) -> bool:
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return False


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 256 KiB."""
    with tempfile.TemporaryDirectory(prefix="farm-t-disk-") as name:
        if os.geteuid() != 0 or not _run(
            "mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", name
        ):
            pytest.skip("a small file system can be mounted by root only")
        try:
            yield Path(name)
        finally:
            assert _run("umount", "-l", name)


def _fill(disk: Path) -> Callable[[], None]:
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()
    return ballast.unlink


def _make_read_only(disk: Path) -> Callable[[], None]:
    assert _run("mount", "-o", "remount,ro", str(disk))

    def mend() -> None:
        assert _run("mount", "-o", f"remount,rw,size={SIZE}", str(disk))

    return mend


@contextmanager
def _bench(home: Path, blobs: Path, n: int) -> Iterator[tuple[Kit, Keeper, str]]:
    """A keeper with `n` finished pictures of a batch."""
    kit = Kit.at(f"sqlite:///{home / 'farm.db'}")
    recorder = Recorder(kit.db, Settings(), lambda claim, picture: None)
    spool = Spool(home / "spool", LANE, 2**30)
    keeper = Keeper(LocalBlobs(blobs), Origin("fake", "ab" * 32), recorder, spool)
    batch = kit.batch(*(spec(str(i)) for i in range(n)))
    for claim in kit.claim(batch, kit.session(), limit=n):
        keeper.keep(claim, PIXELS, 0.1)
    yield kit, keeper, batch
    keeper.close()
    assert recorder.close(10)
    kit.db.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(_fill, "is full; free some space"), (_make_read_only, "is read-only")],
    ids=["full", "read-only"],
)
def test_pictures_are_held_until_the_disk_takes_them(
    tmp_path: Path, small_disk: Path, spoil: Callable[[Path], Callable[[], None]], said: str
) -> None:
    (small_disk / "blobs").mkdir()
    mend = spoil(small_disk)
    n = 4
    with _bench(tmp_path, small_disk / "blobs", n) as (kit, keeper, batch):
        poll(lambda: keeper.spooled == n, "the spool", 10)
        assert said in keeper.trouble
        assert kit.states(batch) == {"running": n}
        mend()
        poll(lambda: kit.states(batch) == {"succeeded": n}, "the records", 20)
