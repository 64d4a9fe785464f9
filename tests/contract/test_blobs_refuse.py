"""A blob store that refuses, for whatever reason: pictures are held, and stored later."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from farm.blobs import BlobStore, open_blobs
from farm.blobs.local import LocalBlobs
from farm.config import Settings
from farm.pictures import Origin
from tests.servers import S3Server, poll
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
def _bench(home: Path, blobs: BlobStore, n: int) -> Iterator[tuple[Kit, Keeper, str]]:
    """A keeper with `n` finished pictures of a batch."""
    kit = Kit.at(f"sqlite:///{home / 'farm.db'}")
    recorder = Recorder(kit.db, Settings(), lambda claim, picture: None)
    spool = Spool(home / "spool", LANE, 2**30)
    keeper = Keeper(blobs, Origin("fake", "ab" * 32), recorder, spool)
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
    with _bench(tmp_path, LocalBlobs(small_disk / "blobs"), n) as (kit, keeper, batch):
        poll(lambda: keeper.spooled == n, "the spool", 10)
        assert said in keeper.trouble
        assert kit.states(batch) == {"running": n}
        mend()
        poll(lambda: kit.states(batch) == {"succeeded": n}, "the records", 20)


def test_pictures_are_held_until_a_missing_bucket_is_made(
    tmp_path: Path, s3_server: S3Server
) -> None:
    s3_server.start()
    name = f"farm-later-{uuid.uuid4().hex[:8]}"
    store = open_blobs(f"s3://{name}", s3=s3_server.options())
    with _bench(tmp_path, store, 2) as (kit, keeper, batch):
        poll(lambda: keeper.spooled == 2, "the spool", 20)
        assert "the bucket does not exist: create it" in keeper.trouble
        s3_server._client.create_bucket(Bucket=name)
        poll(lambda: kit.states(batch) == {"succeeded": 2}, "the records", 20)
    store.close()


def test_wrong_credentials_fail_no_job(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    store = open_blobs(f"s3://{s3_bucket}", s3=s3_server.options(secret_key="wrong"))
    with _bench(tmp_path, store, 2) as (kit, keeper, batch):
        poll(lambda: keeper.spooled == 2, "the spool", 20)
        assert "wrong credentials" in keeper.trouble
        assert kit.states(batch) == {"running": 2}
    assert len(list((tmp_path / "spool").glob("*/loose/*"))) == 2
    store.close()
