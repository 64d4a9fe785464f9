"""Many at once on one store, each with connections of its own: nothing twice, and no deadlock."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import Connection, select, text

from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import EngineCrashed, NotFound, RenderFailed, StorageUnavailable
from farm.pictures import object_key
from farm.reconcile import end_stopped, reconcile
from farm.spec import NewJob
from farm.states import JobState
from farm.store import batches, jobs, owners, prune, reuse, sessions
from farm.store import tables as t
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from farm.submitting import Plan, submit
from farm.verdict import give_back, settle_failure
from tests import servers
from tests.store_kit import LANE, Kit, spec

SETTINGS = Settings(max_failures=3, retry_delay_s=0.0)
THREADS, STEPS = 6, 60


class Player:
    """Someone who does anything that a worker, a person or the dispatcher may do, at random."""

    def __init__(self, url: str, seed: int) -> None:
        self.kit, self.random = Kit.at(url), random.Random(seed)
        self.session = self.kit.session(memory=seed * 100)
        self.held: list[Claim] = []
        self.claimed: list[tuple[JobRef, int]] = []
        self.recorded: list[JobRef] = []

    def play(self, start: threading.Barrier) -> None:
        start.wait()
        acts = (self.submit, self.claim, self.claim, self.record, self.record, self.fail, self.link,
                self.cancel, self.redrive, self.upkeep, self.prune, self.limit)  # fmt: skip
        for _ in range(STEPS):
            self.random.choice(acts)()

    def submit(self) -> None:
        wanted = [spec(seed=self.random.randrange(4), width=self.random.choice((64, 128)))
                  for _ in range(self.random.randrange(1, 8))]  # fmt: skip
        plan = Plan(owner=self.random.choice("ab"), after=self._any(), eager=self._maybe())
        try:
            submit(self.kit.db, map(NewJob.of, wanted), plan)
        except NotFound:  # the batch to come after was pruned meanwhile
            assert plan.after

    def claim(self) -> None:
        bundle = claim_bundle(self.kit.db, self.session, LANE, self.random.randrange(1, 8))
        self.claimed += [(claim.ref, claim.claim_no) for claim in bundle]
        self.held += bundle
        with self.kit.db.write() as connection:
            jobs.mark_started(connection, bundle[::2])
            jobs.record_progress(connection, [(claim, 0.5) for claim in bundle])

    def record(self) -> None:
        some, self.held = self.held[:5], self.held[5:]
        done = [(claim, self._picture(claim)) for claim in some]
        with self.kit.db.write() as connection:
            jobs.lock(connection, some)
            moved = jobs.succeed(connection, done)
        self.recorded += moved

    def fail(self) -> None:
        some, self.held = self.held[:3], self.held[3:]
        error = self.random.choice((RenderFailed, EngineCrashed, StorageUnavailable, None))
        with self.kit.db.write() as connection:
            jobs.lock(connection, some)
            for claim in some:
                if error:
                    settle_failure(connection, claim, error(), SETTINGS)
                else:
                    give_back(connection, claim, "a test")

    def link(self) -> None:
        marks = {claim: claim.spec.fingerprint("fake", "0" * 64) for claim in self.held[:4]}
        if not marks:
            return
        with self.kit.db.read() as connection:
            batch_id = next(iter(marks)).ref.batch_id
            found = reuse.rendered(connection, batch_id, list(set(marks.values())))
        with self.kit.db.write() as connection:
            reuse.link(connection, {c: found[mark] for c, mark in marks.items() if mark in found})

    def cancel(self) -> None:
        batch_id, idx = self._any(), self.random.choice((None, 0, 1))
        if batch_id and idx is None:
            with self.kit.db.write() as connection:
                batches.set_cancelled(connection, batch_id)
        if batch_id:
            with self.kit.db.write() as connection:
                jobs.request_cancel(connection, batch_id, idx)

    def redrive(self) -> None:
        if batch_id := self._any():
            with self.kit.db.write() as connection:
                jobs.redrive(connection, batch_id, [JobState.FAILED, JobState.CANCELLED])

    def upkeep(self) -> None:
        if self._maybe():  # a worker ends, and another life of it begins
            with self.kit.db.write() as connection:
                sessions.close(connection, self.session)
            self.session = self.kit.session(memory=100)
        reconcile(self.kit.db, SETTINGS)
        end_stopped(self.kit.db)

    def prune(self) -> None:
        if batch_id := self._any():
            with self.kit.db.write() as connection:
                prune.step(connection, batch_id, 3)

    def limit(self) -> None:
        most = self.random.choice((None, 2, 5))
        with self.kit.db.write() as connection:
            owners.set_limits(connection, "*", owners.Limits(max_running=most))

    def _picture(self, claim: Claim) -> Picture:
        key = object_key(claim.ref, claim.claim_no, claim.session_id, "png")
        return Picture(key, "0" * 64, 10, 0.5, claim.spec.fingerprint("fake", "0" * 64))

    def _any(self) -> str | None:
        with self.kit.db.read() as connection:
            known = list(connection.scalars(select(t.batches.c.id)))
        return self.random.choice([None, *known])

    def _maybe(self) -> bool:
        return self.random.random() < 0.5


@pytest.mark.parametrize("seed", [1, 2])
def test_whoever_does_what_at_once_the_store_stays_whole(database_url: str, seed: int) -> None:
    players = [Player(database_url, seed * 100 + n) for n in range(THREADS)]
    start = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda player: player.play(start), players))  # raises what escaped
    claimed = Counter(one for player in players for one in player.claimed)
    assert max(claimed.values()) == 1, "a claim was given twice"
    recorded = Counter(ref for player in players for ref in player.recorded)
    assert max(recorded.values()) == 1, "a job was recorded twice"
    _assert_whole(players[0].kit)
    _finish(players[0])
    _assert_whole(players[0].kit)
    for player in players:
        player.kit.db.close()


def _finish(player: Player) -> None:
    """Everyone else is gone; what is left can be rendered by one who stays."""
    player.limit = lambda: None  # type: ignore[method-assign]
    db = player.kit.db
    with db.write() as connection:
        owners.set_limits(connection, "*", None)
        for worker in sessions.live(connection):
            sessions.close(connection, worker.id)
    reconcile(db, SETTINGS)
    end_stopped(db)
    player.session, player.held = player.kit.session(memory=10**6), []
    while player.held or _claim_more(player):
        player.record()
    with db.read() as connection:
        left = {s.id: s.counts for s in batches.recent(connection, 1000) if not s.done}
    assert left == {}


def _claim_more(player: Player) -> bool:
    player.claim()
    return bool(player.held)


def _assert_whole(kit: Kit) -> None:
    with kit.db.read() as connection:
        every = list(connection.scalars(select(t.batches.c.id)))
        open_ = {s.id: s.open for s in batches.recent(connection, 10_000)}
        finished = dict(connection.execute(select(t.batches.c.id, t.batches.c.finished_at)).all())
        whole = dict(connection.execute(select(t.batches.c.id, t.batches.c.whole)).all())
        dropped = set(prune.dropped(connection, 10_000))
        keys = set(connection.scalars(select(t.jobs.c.object_key)))
    for batch_id in every:
        kit.states(batch_id)
        assert (finished[batch_id] is not None) == (whole[batch_id] and not open_[batch_id])
    assert not keys & dropped, "an object is to be deleted that a job names"


def test_a_cancel_of_many_waits_for_nobody(pg_url: str) -> None:
    """Others lock jobs in another order; waiting for them would be a deadlock now and then."""
    kit = Kit.at(pg_url)
    batch = kit.batch(*(spec(str(i)) for i in range(4)))
    with kit.db.write() as other:
        other.execute(select(t.jobs).where(t.jobs.c.idx == 2).with_for_update())
        with kit.db.write() as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
            assert jobs.request_cancel(connection, batch) == (3, 0)
    with kit.db.write() as connection:
        assert jobs.request_cancel(connection, batch) == (1, 0)
    kit.db.close()


def _while_another_waits(
    url: str, first: Callable[[Connection], object], then: Callable[[Connection], object]
) -> None:
    """Commit `first` when `then`, in another transaction, waits for it; raise what `then` does."""

    def run() -> None:
        with other.write() as connection:
            then(connection)

    waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with closing(Database(url)) as db, closing(Database(url)) as other:
        with ThreadPoolExecutor(1) as pool, db.write() as connection:
            first(connection)
            waiting = pool.submit(run)
            servers.poll(lambda: bool(connection.scalar(waits)), "one who waits", 20)
        waiting.result(20)


def test_limits_set_by_two_at_once(pg_url: str) -> None:
    Kit.at(pg_url).db.close()

    def give(most: int) -> Callable[[Connection], None]:
        return lambda c: owners.set_limits(c, "ann", owners.Limits(max_running=most))

    _while_another_waits(pg_url, give(1), give(2))
    db = Database(pg_url)
    with db.read() as connection:
        assert owners.limits_of(connection, "ann") == owners.Limits(max_running=2)
    db.close()


def test_a_batch_after_one_that_is_removed_just_now(pg_url: str) -> None:
    kit = Kit.at(pg_url)
    former = kit.batch(spec())

    def create(connection: Connection) -> None:
        batches.create(connection, {}, name="", owner="", priority=0, after=former)

    with pytest.raises(NotFound):
        _while_another_waits(pg_url, lambda c: batches.remove(c, former), create)
    kit.db.close()
