"""The keeper and its spool: SQLite in a temporary file, a store that fails as told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from farm.blobs import BlobStore, open_blobs
from farm.config import Settings, load_settings
from farm.errors import BlobDamaged, InvalidConfig, StorageRefused, StorageUnavailable
from farm.pictures import Origin
from farm.store import jobs, reads
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from farm.store.reads import Job
from tests.servers import poll
from tests.store_kit import LANE, Kit, spec
from workers import keeper as keeper_module
from workers import outage as outage_module
from workers import spool as spool_module
from workers.keeper import Keeper
from workers.recorder import Recorder
from workers.spool import Spool, SpoolFull

PIXELS = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
LARGE = 2**30


class Store:
    """A store that is away, or hangs, until it is told otherwise; `puts` counts what it took."""

    def __init__(self, real: BlobStore) -> None:
        self._real = real
        self.there, self.answers = threading.Event(), threading.Event()
        self.there.set()
        self.answers.set()
        self.refuses = False
        self.puts, self.asked = 0, threading.Semaphore(0)

    def put(self, key: str, data: bytes, content_type: str) -> None:
        self.asked.release()
        assert self.answers.wait(20)
        if not self.there.is_set():
            raise (StorageRefused if self.refuses else StorageUnavailable)("the store is away")
        self._real.put(key, data, content_type)
        self.puts += 1

    def delete(self, keys: list[str]) -> None:
        self._real.delete(keys)


class Bench:
    """A farm's store and spool, with as many keepers after each other as a test likes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.kit = Kit.at(f"sqlite:///{home / 'farm.db'}")
        self.store = Store(open_blobs((home / "blobs").as_uri()))
        self.settings = Settings(retry_delay_s=0.0)
        self.session = self.kit.session()
        self._open: list[tuple[Keeper, Recorder]] = []

    def keeper(self, most_bytes: int = LARGE) -> Keeper:
        dropped: Callable[..., None] = lambda claim, picture: keeper.drop(claim, picture)  # noqa: E731
        recorder = Recorder(self.kit.db, self.settings, dropped)
        spool = Spool(self.home / "spool", LANE, most_bytes)
        spool.sweep()
        keeper = Keeper(self.store, Origin("fake", "ab" * 32), recorder, spool)  # type: ignore[arg-type]
        self._open.append((keeper, recorder))
        return keeper

    def claims(self, n: int) -> list[Claim]:
        batch = self.kit.batch(*(spec(str(i)) for i in range(n)))
        return self.kit.claim(batch, self.session, limit=n)

    def job(self, ref: JobRef) -> Job:
        with self.kit.db.read() as connection:
            return reads.job(connection, ref)

    def states(self, claim: Claim) -> dict[str, int]:
        return self.kit.states(claim.ref.batch_id)

    def files(self) -> list[Path]:
        """The pictures that are whole there."""
        found = (self.home / "spool").rglob("*")
        return [p for p in found if p.is_file() and not p.name.startswith(("lock", ".part-"))]

    def end(self, keeper: Keeper) -> None:
        """As a worker does that is to end."""
        (recorder,) = [r for k, r in self._open if k is keeper]
        keeper.close()
        assert recorder.close(10)
        self._open.remove((keeper, recorder))

    def close(self) -> None:
        self.store.answers.set()
        for keeper, _ in list(self._open):
            self.end(keeper)
        self.kit.db.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def soon(ready: Callable[[], bool]) -> None:
    poll(ready, "the record", 10)


def keep_all(keeper: Keeper, claims: list[Claim]) -> tuple[threading.Thread, list[Claim]]:
    """The engine's thread, and which pictures it is rid of."""
    kept: list[Claim] = []

    def engine() -> None:
        for claim in claims:
            keeper.keep(claim, PIXELS, 0.25)
            kept.append(claim)

    thread = threading.Thread(target=engine)
    thread.start()
    return thread, kept


def test_pictures_are_spooled_while_the_store_is_away_and_stored_when_it_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_WAITING", 2)
    keeper, claims = bench.keeper(), bench.claims(40)
    bench.store.there.clear()
    thread, _ = keep_all(keeper, claims)
    thread.join(10)
    soon(lambda: len(bench.files()) == 40)
    soon(lambda: keeper.spooled >= 39)  # one may just be tried
    assert "the store is away" in keeper.trouble
    assert bench.states(claims[0]) == {"running": 40}
    bench.store.there.set()
    soon(lambda: bench.states(claims[0]) == {"succeeded": 40})
    job = bench.job(claims[7].ref)
    assert (job.failures, job.claim_no, job.render_s) == (0, 1, 0.25)
    assert job.object_key
    assert len(open_blobs((bench.home / "blobs").as_uri()).get(job.object_key)) == job.size_bytes
    soon(lambda: not bench.files())
    assert (keeper.trouble, keeper.spooled, bench.store.puts) == ("", 0, 40)


@pytest.mark.parametrize("most_bytes", [0, 30_000])
def test_the_engine_waits_when_memory_and_spool_are_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_WAITING", 8)
    keeper, claims = bench.keeper(most_bytes), bench.claims(40)
    bench.store.there.clear()
    thread, kept = keep_all(keeper, claims)
    soon(lambda: "is full" in keeper.trouble and keeper._in_memory == 8)
    soon(lambda: len(kept) == 8 + len(bench.files()))
    assert len(kept) < 40
    bench.store.there.set()
    thread.join(20)
    soon(lambda: bench.states(claims[0]) == {"succeeded": 40})
    assert not any(bench.job(claim.ref).failures for claim in claims)
    assert keeper.trouble == ""


@pytest.mark.parametrize("bound", [("MOST_WAITING", 2), ("MOST_BYTES", 2 * PIXELS.nbytes)])
def test_the_engine_waits_when_too_many_pictures_do(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, bound: tuple[str, int]
) -> None:
    monkeypatch.setattr(keeper_module, *bound)
    keeper, claims = bench.keeper(), bench.claims(40)
    bench.store.answers.clear()
    thread, kept = keep_all(keeper, claims)
    soon(lambda: len(kept) == 2)
    thread.join(0.05)
    assert len(kept) == 2
    bench.store.answers.set()
    thread.join(10)
    soon(lambda: bench.states(claims[0]) == {"succeeded": 40})
    assert not bench.files()


def test_pictures_are_spooled_while_the_store_hangs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_WAITING", 8)
    monkeypatch.setattr(outage_module, "STUCK_S", 0.1)
    keeper, claims = bench.keeper(), bench.claims(40)
    bench.store.answers.clear()
    thread, kept = keep_all(keeper, claims)
    thread.join(10)
    assert len(kept) == 40
    assert "not answered" in keeper.trouble
    assert len(bench.files()) == 32
    bench.store.answers.set()
    soon(lambda: bench.states(claims[0]) == {"succeeded": 40})


def test_an_upload_that_takes_too_long_is_told(bench: Bench) -> None:
    keeper, claims = bench.keeper(), bench.claims(1)
    keeper._upload_timeout_s = 0.2
    bench.store.answers.clear()
    keep_all(keeper, claims)[0].join(10)
    soon(lambda: "and upload_timeout_s allows 0.2; no more is claimed" in keeper.trouble)
    assert keeper.claims_none
    bench.store.answers.set()
    soon(lambda: bench.states(claims[0]) == {"succeeded": 1})
    soon(lambda: keeper.trouble == "")


def test_a_store_that_refuses_this_worker_is_no_outage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage_module, "PAUSE_S", 0.01)
    keeper, claims = bench.keeper(), bench.claims(2)
    bench.store.there.clear()
    keep_all(keeper, claims[:1])[0].join(10)
    soon(lambda: "away" in keeper.trouble)
    assert keeper.claims_none == "", "an outage is everybody's: rendering goes on"
    bench.store.refuses = True
    soon(lambda: "no more is claimed until it takes a picture" in keeper.claims_none)
    tried = bench.store.asked
    for _ in range(50):
        assert tried.acquire(timeout=10)
        assert keeper.claims_none, "also while it is tried with the only picture"
        if keeper._outage._pause > 0.1:
            break
    assert keeper.trouble == keeper.claims_none
    bench.store.there.set()
    soon(lambda: bench.states(claims[0]) == {"succeeded": 1, "running": 1})
    soon(lambda: keeper.claims_none == keeper.trouble == "")


def test_when_all_that_was_refused_is_cancelled_one_more_is_tried(bench: Bench) -> None:
    keeper, claims = bench.keeper(), bench.claims(1)
    bench.store.refuses = True
    bench.store.there.clear()
    keep_all(keeper, claims)[0].join(10)
    soon(lambda: bool(keeper.claims_none))
    with bench.kit.db.write() as connection:
        jobs.request_cancel(connection, claims[0].ref.batch_id, claims[0].ref.idx)

    def cancelled() -> bool:
        keeper.cancel({claims[0].ref})
        return bench.states(claims[0]) == {"cancelled": 1}

    soon(cancelled)
    soon(lambda: keeper.claims_none == "")


def test_a_worker_that_ends_leaves_its_pictures_to_the_next_claim(bench: Bench) -> None:
    keeper, claims = bench.keeper(), bench.claims(3)
    bench.store.there.clear()
    keep_all(keeper, claims)[0].join(10)
    bench.end(keeper)
    assert bench.states(claims[0]) == {"queued": 3}
    assert len(bench.files()) == 3
    job = bench.job(claims[0].ref)
    assert job.failures == 0
    assert "is in the spool" in (job.error or "")
    bench.store.there.set()
    successor = bench.keeper()
    again = bench.kit.claim(claims[0].ref.batch_id, bench.session, limit=3)
    others = bench.claims(1)
    assert successor.adopt([*again, *others]) == others
    soon(lambda: bench.states(claims[0]) == {"succeeded": 3})
    job = bench.job(claims[0].ref)
    assert (job.claim_no, job.render_s, job.failures) == (2, 0.25, 0)
    soon(lambda: not bench.files())


def test_a_store_that_hangs_does_not_hold_up_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage_module, "STUCK_S", 0.1)
    keeper, claims = bench.keeper(), bench.claims(12)
    bench.store.answers.clear()
    keep_all(keeper, claims)[0].join(10)
    for _ in range(4):
        assert bench.store.asked.acquire(timeout=10)
    began = time.monotonic()
    bench.end(keeper)
    assert time.monotonic() - began < 5
    assert bench.states(claims[0]) == {"queued": 12}
    assert len(bench.files()) == 12


def test_pictures_of_a_killed_worker_are_found(bench: Bench) -> None:
    keeper, claims = bench.keeper(), bench.claims(2)
    names = [keeper._name(claim) for claim in claims]
    code = (
        "import sys; from pathlib import Path; from farm.catalog import Lane;"
        "from workers.spool import Spool;"
        "spool = Spool(Path(sys.argv[1]), Lane(*sys.argv[2:4]), 2**30);"
        "[spool.add(name, b'picture', 1.5) for name in sys.argv[4:]]; print('held', flush=True);"
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, bench.home / "spool", *LANE, *names]
    with subprocess.Popen(words, stdin=-1, stdout=-1) as victim:
        assert victim.stdout
        assert victim.stdout.readline() == b"held\n"
        keeper._spool.sweep()
        assert keeper.adopt(claims) == claims, "they are another's as long as it lives"
        victim.kill()
    keeper._spool.sweep()
    assert keeper.adopt(claims) == []
    soon(lambda: bench.states(claims[0]) == {"succeeded": 2})
    assert bench.job(claims[0].ref).render_s == 1.5


def test_a_damaged_picture_costs_its_job_nothing(bench: Bench) -> None:
    keeper, claims = bench.keeper(), bench.claims(2)
    bench.store.there.clear()
    keep_all(keeper, claims)[0].join(10)
    soon(lambda: len(bench.files()) == 2)
    damaged = claims[0].ref
    (path,) = [p for p in bench.files() if p.name.startswith(f"{damaged.batch_id}-{damaged.idx}-")]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bench.store.there.set()
    soon(lambda: bench.states(claims[0]) == {"queued": 1, "succeeded": 1})
    job = bench.job(damaged)
    assert (job.error_code, job.failures) == (BlobDamaged.code, 0)
    soon(lambda: not bench.files())


def test_what_is_cancelled_or_lost_while_it_is_held(bench: Bench) -> None:
    keeper, claims = bench.keeper(), bench.claims(3)
    bench.store.there.clear()
    keep_all(keeper, claims)[0].join(10)
    soon(lambda: len(bench.files()) == 3)
    with bench.kit.db.write() as connection:
        jobs.request_cancel(connection, claims[0].ref.batch_id, claims[0].ref.idx)

    def cancelled() -> bool:
        keeper.cancel({claims[0].ref})  # as with each look of the heart: one may just be tried
        return bench.states(claims[0]) == {"running": 2, "cancelled": 1}

    soon(cancelled)
    soon(lambda: len(bench.files()) == 2)

    def abandoned() -> bool:
        keeper.abandon("its session was lost")
        return bench.states(claims[0]) == {"queued": 2, "cancelled": 1}

    soon(abandoned)
    again = bench.kit.claim(claims[0].ref.batch_id, bench.session, limit=2)
    assert keeper.adopt(again) == []
    bench.store.there.set()
    soon(lambda: bench.states(claims[0]) == {"succeeded": 2, "cancelled": 1})


def test_pixels_of_a_wrong_size_fail_the_job_and_release_it(bench: Bench) -> None:
    keeper, (claim,) = bench.keeper(), bench.claims(1)
    keeper.keep(claim, PIXELS[:32], 0.1)
    soon(lambda: bench.states(claim) == {"queued": 1})
    assert bench.job(claim.ref).failures == 1


# ---- the spool alone

Make = Callable[[int], Spool]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Spools in one directory, of so many bytes."""
    made: list[Spool] = []

    def one(most_bytes: int) -> Spool:
        made.append(Spool(tmp_path / "spool", LANE, most_bytes))
        return made[-1]

    yield one
    for spool in made:
        spool.close()


def test_a_spool_has_a_bound_and_is_private(tmp_path: Path, make: Make) -> None:
    spool = make(1000)
    first = spool.add("first", b"x" * 700, 0.5)
    with pytest.raises(SpoolFull, match=r"1 pictures of .*; spool_max is"):
        spool.add("second", b"x" * 700, 0.5)
    assert spool.read(first) == (b"x" * 700, 0.5)
    for path in (tmp_path / "spool", *(tmp_path / "spool").rglob("*")):
        assert path.name == "lock" or not path.stat().st_mode & 0o077, path
    spool.drop(first)
    spool.loosen(spool.add("second", b"x" * 700, 0.5))
    spool.add("third", b"x" * 700, 0.5)
    assert spool.loose() == {"second"}


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make(LARGE)
    spool.add("first", b"x", 0.5)
    replace = Path.rename

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SpoolFull, match="No space left on device"):
        spool.add("second", b"x", 0.5)
    monkeypatch.setattr(Path, "rename", replace)
    names = {p.name for p in (tmp_path / "spool").rglob("*") if p.is_file()}
    assert names == {"first", "lock"}
    assert spool.add("third", b"x", 0.5)


def test_old_pictures_and_those_beyond_the_bound_are_removed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make(2000)
    for age_s, name in enumerate(("new", "newer", "newest")):
        spool.loosen(spool.add(name, b"x" * 800, 0.5))
        at = time.time() - 10 + age_s
        os.utime(spool._loose / name, (at, at))
    spool.sweep()
    assert spool.loose() == {"newer", "newest"}
    monkeypatch.setattr(spool_module, "KEEP_S", 0.0)
    spool.sweep()
    assert spool.loose() == set()


def test_two_take_one_picture_and_one_gets_it(make: Make) -> None:
    one, two = (make(LARGE) for _ in range(2))
    for n in range(20):
        one.loosen(one.add(f"{n}", b"x", 0.5))
    taken: list[str] = []

    def take(spool: Spool) -> None:
        for name in sorted(spool.loose()):
            with suppress(FileNotFoundError):
                if spool.take(name):
                    taken.append(name)

    threads = [threading.Thread(target=take, args=(spool,)) for spool in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(taken) == sorted(map(str, range(20)))


def test_the_spool_s_size_is_written_as_people_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_SPOOL_MAX", "1.5GiB")
    assert load_settings().spool_max == 1.5 * 2**30
    monkeypatch.setenv("FARM_SPOOL_MAX", "4096")
    assert load_settings().spool_max == 4096
    monkeypatch.setenv("FARM_SPOOL_MAX", "much")
    with pytest.raises(InvalidConfig, match=r"spool_max.*'much' is no size"):
        load_settings()
