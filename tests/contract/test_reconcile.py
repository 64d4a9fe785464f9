"""What died or drifted is put right, by any number at once and beside a farm at work."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from farm import dispatcher
from farm.blobs.local import LocalBlobs
from farm.broker import Broker
from farm.catalog import Lane
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import (
    BrokerUnavailable,
    DatabaseUnavailable,
    InvalidConfig,
    OutOfMemory,
    StorageUnavailable,
)
from farm.pictures import object_key
from farm.reconcile import Report, mend_all, mend_counters
from farm.store import audit as store
from farm.store import batches, counters, jobs, reads, sessions
from farm.store.ids import JobRef
from farm.store.tables import batches as batches_table
from farm.store.tables import counts as counts_table
from farm.store.tables import dropped_objects
from farm.store.tables import sessions as sessions_table
from farm.verdict import settle_failure
from tests.gallery_kit import Gallery
from tests.store_kit import LANE, spec

SETTINGS = Settings(tokens_per_worker=2)


class Bell(Broker):
    """Queues in memory."""

    def __init__(self) -> None:
        self.queues: Counter[Lane] = Counter()

    def length(self, lane: Lane) -> int:
        return self.queues[lane]

    def publish(self, lane: Lane, n: int = 1) -> None:
        self.queues[lane] += n


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Iterator[Gallery]:
    shop = Gallery.of(database_url, LocalBlobs(tmp_path / "blobs"))
    yield shop
    shop.db.close()


def mend(shop: Gallery, bell: Broker | None = None, *, dry_run: bool = False) -> Report:
    bell = bell or Bell()
    return mend_all(shop.db, lambda: shop.blobs, lambda: bell, SETTINGS, dry_run=dry_run)


def harm(shop: Gallery, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One of each thing that a reconcile mends; the batches by what befell them."""
    monkeypatch.setattr(sessions, "AWAY_S", 0.0)
    done = shop.rendered("done", "and done")
    expired, ended, vanished = (shop.batch(spec(why)) for why in ("expired", "ended", "vanished"))
    shop.claim(expired, shop.session(ttl_s=-1.0))
    closed, gone = shop.session(), shop.session()
    shop.claim(ended, closed)
    shop.claim(vanished, gone)
    needy = shop.batch(spec("needy"))
    small, large = shop.session(memory=1), shop.session(memory=2)
    (held,) = shop.claim(needy, small)
    stopped, half = shop.batch(spec("stopped")), shop.batch(spec("half"), ready=False)
    with shop.db.write() as connection:
        assert settle_failure(connection, held, OutOfMemory(), SETTINGS)
        sessions.close(connection, closed)
        sessions.close(connection, small)
        sessions.close(connection, large)
        connection.execute(delete(sessions_table).where(sessions_table.c.id == gone))
        batches.set_cancelled(connection, stopped)
        mine = batches_table.c.id == half
        connection.execute(update(batches_table).where(mine).values(touched_at=1.0))
        connection.execute(dropped_objects.insert().values(key="pictures/dropped.png"))
        connection.execute(
            update(batches_table).where(batches_table.c.id == done).values(finished_at=None)
        )
    shop.miscount(done, queued=3)
    for key in ("pictures/dropped.png", object_key(JobRef(done, 0), 1, "0" * 32, "png")):
        shop.blobs.put(key, b"12345", "image/png")
    shop.session()
    return {
        "done": done, "expired": expired, "ended": ended, "vanished": vanished, "needy": needy,
        "stopped": stopped, "half": half,
    }  # fmt: skip


KINDS = {
    "session": 1, "claims": 2, "need": 1, "stopped": 1, "abandoned": 1, "counters": 1, "end": 1,
    "objects": 2, "tokens": 1,
}  # fmt: skip


def test_each_thing_is_mended_once_and_told(shop: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    about, bell = harm(shop, monkeypatch), Bell()
    assert shop.look().wrong == {"counters": 1, "held": 3, "orphan": 1}
    seen = Counter(one.kind for one in mend(shop, bell, dry_run=True).repairs)
    assert seen + Counter(end=1) == KINDS, "the end is seen when the counters are right"
    assert shop.look().wrong == {"counters": 1, "held": 3, "orphan": 1}, "nothing was changed"
    assert not bell.queues

    report = mend(shop, bell)
    assert Counter(one.kind for one in report.repairs) == KINDS
    assert report.troubles == []
    assert bell.queues == {LANE: 4}  # of two workers
    assert mend(shop, bell).repairs == []
    assert shop.look().ok
    assert {key.key for key in shop.blobs.list()} == {
        one.object_key for one in shop.pictures(about["done"])
    }
    for why, states in {
        "done": {"succeeded": 2}, "expired": {"queued": 1}, "ended": {"queued": 1},
        "vanished": {"queued": 1}, "needy": {"queued": 1}, "stopped": {"cancelled": 1}, "half": {},
    }.items():  # fmt: skip
        if why != "half":
            assert shop.states(about[why]) == states


def test_what_touched_a_job_is_in_its_history(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = harm(shop, monkeypatch)
    mend(shop)
    for why, kind in {
        "expired": "requeued", "ended": "requeued", "vanished": "requeued", "needy": "repaired",
        "stopped": "cancelled",
    }.items():  # fmt: skip
        with shop.db.read() as connection:
            history = reads.history(connection, JobRef(about[why], 0))
        assert [event["kind"] for event in history][-1] == kind, why
        assert history[-1]["message"]


def test_what_is_away_is_told_and_the_rest_is_mended(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm(shop, monkeypatch)

    def away() -> Any:
        raise StorageUnavailable("the store is away")

    class Mute(Bell):
        def length(self, lane: Lane) -> int:
            raise BrokerUnavailable("Redis is away")

    report = mend_all(shop.db, away, Mute, SETTINGS)
    assert report.troubles == ["the store is away", "Redis is away"]
    assert set(KINDS) - {one.kind for one in report.repairs} == {"objects", "tokens"}


def test_two_at_once_mend_each_thing_once(shop: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    about = harm(shop, monkeypatch)
    both = threading.Barrier(3)

    def one() -> Report:
        both.wait()
        return mend(shop)

    with ThreadPoolExecutor(3) as pool:
        reports = [future.result() for future in [pool.submit(one) for _ in range(3)]]
    assert shop.look().ok
    told = Counter(one.kind for report in reports for one in report.repairs)
    for kind in ("session", "claims", "need", "stopped", "counters", "end"):
        assert told[kind] == KINDS[kind], kind
    with shop.db.read() as connection:
        for why in ("expired", "ended", "vanished"):
            assert len(reads.history(connection, JobRef(about[why], 0))) == 1
            assert reads.job(connection, JobRef(about[why], 0)).claim_no == 1


def test_counters_are_mended_beside_a_farm_at_work(shop: Gallery) -> None:
    """Claims, pictures and failures of four workers while counters are bent and two mend them."""
    chosen = [shop.batch(*(spec(str(n)) for n in range(60))) for _ in range(3)]
    luck, ended = random.Random(5), threading.Event()

    def work() -> None:
        session = shop.session()
        while bundle := claim_bundle(shop.db, session, LANE, 3):
            with shop.db.write() as connection:
                jobs.lock(connection, bundle)
                jobs.succeed(connection, [(held, shop.put(held)) for held in bundle[1:]])
                jobs.fail(connection, bundle[0], OutOfMemory())

    def bend() -> None:
        """More than there are: fewer would let no transition pass that counts below zero."""
        for _ in range(30):
            state = luck.choice(("queued", "running", "succeeded", "failed"))
            with shop.db.write() as connection:
                mine = counts_table.c.batch_id == luck.choice(chosen)
                more = {state: counts_table.c[state] + luck.randint(1, 9)}
                connection.execute(update(counts_table).where(mine).values(more))

    def keep() -> None:
        while not ended.is_set():
            mend_counters(shop.db, chosen)

    with ThreadPoolExecutor(8) as pool:
        menders = [pool.submit(keep) for _ in range(2)]
        busy = [pool.submit(work) for _ in range(4)] + [pool.submit(bend)]
        for future in busy:
            future.result()
        ended.set()
        for future in menders:
            future.result()
    work()  # what the bent counters hid from the workers
    mend_counters(shop.db, chosen)
    assert shop.look().ok
    for batch_id in chosen:
        states = shop.states(batch_id)
        assert states["succeeded"] + states["failed"] == 60


def test_counters_that_are_not_there_are_made_and_an_end_is_taken_back(shop: Gallery) -> None:
    batch_id = shop.batch(spec("a"), spec("b", engine="fake"))
    with shop.db.write() as connection:
        connection.execute(delete(counts_table))
        connection.execute(update(batches_table).values(finished_at=1.0))
    with shop.db.read() as connection:
        told = [str(drift) for drift in counters.drift(connection, batch_id)]
    assert told == ["shapes: queued 0, not 1", "shapes:fake: queued 0, not 1"]
    mend_counters(shop.db, [batch_id])
    assert shop.states(batch_id) == {"queued": 2}
    with shop.db.read() as connection:
        assert batches.status(connection, batch_id).finished_at is None
    assert shop.look().ok


def test_an_end_is_when_the_last_job_ended(shop: Gallery) -> None:
    batch_id = shop.rendered("a")
    with shop.db.write() as connection:
        ended = batches.status(connection, batch_id).finished_at
        connection.execute(update(batches_table).values(finished_at=None))
    mend_counters(shop.db, [batch_id])
    with shop.db.read() as connection:
        assert batches.status(connection, batch_id).finished_at == pytest.approx(ended, abs=1.0)


def test_every_batch_and_those_at_work(shop: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE", 2)
    done, *more = shop.rendered("a"), *(shop.batch(spec(str(n))) for n in range(3))
    more.sort()  # ids of one millisecond come in any order
    assert list(store.every_batch(shop.db)) == [done, *more]
    assert list(store.every_batch(shop.db, done)) == more
    with shop.db.write() as connection:
        assert set(store.busy_batches(connection, 60.0)) == {done, *more}
        mine = batches_table.c.id == done
        connection.execute(update(batches_table).where(mine).values(finished_at=1.0))
        assert set(store.busy_batches(connection, 60.0)) == set(more)


def upkeep(shop: Gallery) -> dispatcher._Upkeep:
    return dispatcher._Upkeep(shop.db, lambda: shop.blobs, threading.Event(), lambda: True)


def test_upkeep_is_done_once_a_day_whoever_leads(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = harm(shop, monkeypatch)
    upkeep(shop).look()
    assert set(shop.look().wrong) == {"held"}, "the tick's part is another's"
    shop.miscount(about["done"], queued=3)
    upkeep(shop).look()
    assert shop.look().wrong["counters"], "not again so soon"


def test_upkeep_that_failed_is_due_again(shop: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    about = harm(shop, monkeypatch)
    with monkeypatch.context() as patched:
        faults = [DatabaseUnavailable("away"), DatabaseUnavailable("away")]
        patched.setattr(dispatcher, "mend_counters", lambda *_: (_ for _ in ()).throw(faults.pop()))
        patched.setattr(shop.blobs, "list", lambda *_: iter(()).__next__())
        upkeep(shop).look()
        assert not faults
    upkeep(shop).look()
    assert set(shop.look().wrong) == {"held"}
    assert shop.states(about["done"]) == {"succeeded": 2}


def test_upkeep_that_was_stopped_is_due_again(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = harm(shop, monkeypatch)
    stopping = upkeep(shop)
    stopping._stop.set()
    stopping.look()
    shop.miscount(about["done"], queued=3)
    upkeep(shop).look()
    assert set(shop.look().wrong) == {"held"}


def test_a_blob_store_that_is_not_set_up_is_told_once(
    shop: Gallery, caplog: pytest.LogCaptureFixture
) -> None:
    def unset() -> Any:
        raise InvalidConfig("there is no such store")

    keeper = dispatcher._Upkeep(shop.db, unset, threading.Event(), lambda: True)
    for _ in range(3):
        keeper.look()
    told = [record.message for record in caplog.records if "no such store" in record.message]
    assert len(told) == 2, "by each of its two duties"
    assert not any(record.exc_info for record in caplog.records)


def test_the_dispatcher_keeps_the_farm_up_beside_its_ticks(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm(shop, monkeypatch)
    monkeypatch.setattr(dispatcher, "UPKEEP_S", 0.01)
    stop, looked = threading.Event(), threading.Event()
    real = dispatcher.remove_objects

    def remove(*args: Any) -> None:
        real(*args)
        looked.set()

    monkeypatch.setattr(dispatcher, "remove_objects", remove)
    settings = Settings(tick_s=0.05)
    whole = threading.Thread(
        target=dispatcher.run_dispatcher,
        args=(shop.db, Bell(), settings, stop, lambda: shop.blobs),
    )
    whole.start()
    assert looked.wait(60)
    stop.set()
    whole.join()
    assert shop.look().ok
