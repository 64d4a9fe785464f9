"""Reuse and retention on both databases: never a succeeded job without its object."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from farm import retention
from farm.blobs import BlobStore
from farm.blobs.local import LocalBlobs
from farm.errors import Invalid, InvalidParameter, NotFound
from farm.pictures import object_key
from farm.spec import JobSpec
from farm.states import JobState
from farm.store import batches, jobs, prune, reads, reuse
from farm.store.ids import JobRef, claim_in
from farm.store.jobs import Claim, Picture
from farm.store.tables import batch_inputs, dropped_objects
from farm.store.tables import batches as batches_table
from farm.store.tables import jobs as jobs_table
from tests.store_kit import Kit, spec

DAY = 86_400.0
LATER = "farm.retention.time.time"  # the clock that tells an object's age


def _fingerprint(one: JobSpec) -> str:
    return one.fingerprint("fake", "0" * 64)


class Shop(Kit):
    """A store with a blob store beside it, and a worker that renders by writing a few bytes."""

    blobs: BlobStore
    session_id: str

    def open(self, blobs: BlobStore) -> None:
        self.blobs, self.session_id = blobs, self.session()

    def render(self, batch_id: str) -> None:
        """Work through a batch as a worker does: link what is there, render the rest."""
        while bundle := self.claim(batch_id, self.session_id, 64):
            left = self.link(bundle)
            done = [(claim, self._picture(claim)) for claim in left]
            with self.db.write() as connection:
                assert jobs.succeed(connection, done) == {claim.ref for claim in left}

    def link(self, bundle: list[Claim]) -> list[Claim]:
        by_ref = {claim: _fingerprint(claim.spec) for claim in bundle}
        with self.db.read() as connection:
            found = reuse.rendered(connection, bundle[0].ref.batch_id, list(by_ref.values()))
        sources = {claim: found[mark] for claim, mark in by_ref.items() if mark in found}
        if not sources:
            return bundle
        with self.db.write() as connection:
            gone = reuse.link(connection, sources)
        return [claim for claim in bundle if claim not in sources or claim.ref in gone]

    def _picture(self, claim: Claim) -> Picture:
        key = object_key(claim.ref, claim.claim_no, claim.session_id, "png")
        data = claim.spec.prompt.encode()
        self.blobs.put(key, data, "image/png")
        return Picture(key, "0" * 64, len(data), 0.1, _fingerprint(claim.spec))

    def rendered(self, *prompts: str, **fields: object) -> str:
        batch_id = self.batch(*(spec(prompt, **fields) for prompt in prompts))
        self.render(batch_id)
        return batch_id

    def stored(self) -> set[str]:
        return {one.key for one in self.blobs.list()}

    def assert_whole(self) -> None:
        with self.db.read() as connection:
            named = set(connection.scalars(select(jobs_table.c.object_key)))
        assert {key for key in named if key} <= self.stored()

    def count(self, table: object) -> int:
        with self.db.read() as connection:
            return connection.scalar(select(func.count()).select_from(table))  # type: ignore


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop.at(database_url)
    assert isinstance(shop, Shop)
    shop.open(LocalBlobs(tmp_path / "blobs"))
    yield shop
    shop.db.close()


def test_the_key_of_a_picture_tells_its_claim() -> None:
    ref = JobRef("0123456789abcdef", 12_345_678)
    for form in ("png", "jpeg", "webp"):
        assert claim_in(object_key(ref, 3, "5e" * 16, form)) == (ref, 3, "5e5e5e5e")
    assert claim_in(f"pictures/{ref.batch_id}/{ref.idx}-3.png") == (ref, 3, "")  # release 0.1
    for strange in ("pictures/x.png", "inputs/ab.png", "pictures/0123456789abcdef/x-1.png"):
        assert claim_in(strange) is None


def test_a_batch_goes_with_its_objects_and_leaves_nothing(shop: Shop) -> None:
    gone, kept = shop.rendered("a", "b", "c"), shop.rendered("d")
    told = retention.prune(shop.db, shop.blobs, [gone])
    assert (told.batches, told.jobs, told.objects, told.bytes, told.kept) == (1, 3, 3, 3, 0)
    assert all(kept in key for key in shop.stored())
    with shop.db.read() as connection, pytest.raises(NotFound):
        batches.status(connection, gone)
    assert shop.states(kept) == {"succeeded": 1}
    assert shop.count(dropped_objects) == 0


def test_a_shared_picture_goes_with_the_last_job_that_names_it(shop: Shop) -> None:
    first, second, third = (shop.rendered("a", "b") for _ in range(3))
    assert len(shop.stored()) == 2
    for batch_id, left in ((second, 2), (first, 2), (third, 0)):
        retention.prune(shop.db, shop.blobs, [batch_id])
        assert len(shop.stored()) == left
        shop.assert_whole()
    fourth = shop.rendered("a")  # nothing to link to any more
    assert all(fourth in key for key in shop.stored())


def test_what_is_linked_can_be_linked_to_when_its_own_batch_is_gone(shop: Shop) -> None:
    first, second = shop.rendered("a"), shop.rendered("a")
    retention.prune(shop.db, shop.blobs, [first])
    shop.rendered("a")
    assert len(shop.stored()) == 1
    retention.prune(shop.db, shop.blobs, [second])
    shop.assert_whole()


def test_what_is_not_done_is_kept(shop: Shop) -> None:
    open_one = shop.batch(spec("a"), spec("b"))
    claim = shop.claim(open_one, shop.session_id)[0]
    told = retention.prune(shop.db, shop.blobs, [open_one])
    assert (told.batches, told.kept, told.jobs) == (0, 1, 0)
    with shop.db.write() as connection:
        jobs.fail(connection, claim, Invalid("bad"))
        jobs.request_cancel(connection, open_one)
    assert retention.prune(shop.db, shop.blobs, [open_one]).jobs == 2


@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere_it_goes_on_and_nothing_is_lost(
    shop: Shop, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of a store's may be the last one of a process."""
    monkeypatch.setattr(retention, "STEP", 3)
    prompts = [f"p{i}" for i in range(10)]
    doomed, sharing = shop.rendered(*prompts), shop.rendered(*prompts[4:7], "other")
    luck, calls = random.Random(seed), 0

    class Killed(BaseException):
        pass

    def mortal(real: object) -> object:
        def call(*args: object) -> object:
            if luck.random() < 0.15:
                raise Killed
            result = real(*args)  # type: ignore[operator]
            if luck.random() < 0.15:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patched:
        patched.setattr(prune, "step", mortal(prune.step))
        patched.setattr(prune, "settle_dropped", mortal(prune.settle_dropped))
        patched.setattr(shop.blobs, "delete", mortal(shop.blobs.delete))
        while True:
            calls += 1
            try:
                retention.prune(shop.db, shop.blobs, [doomed])
                break
            except Killed:
                shop.assert_whole()
                with shop.db.read() as connection:
                    if connection.scalar(
                        select(batches_table.c.id).where(batches_table.c.id == doomed)
                    ):
                        left = batches.status(connection, doomed)
                        assert left.total == sum(left.counts.values())
    retention.prune(shop.db, shop.blobs, [])  # takes up what was noted
    assert shop.states(sharing) == {"succeeded": 4}
    with shop.db.read() as connection:
        named = {job.object_key for job in reads.page(connection, sharing)}
    assert shop.stored() == named


def test_linking_and_pruning_at_once_never_leaves_a_job_without_its_picture(shop: Shop) -> None:
    prompts = [f"p{i}" for i in range(40)]
    for _ in range(5):
        old = shop.rendered(*prompts)
        new = shop.batch(*(spec(prompt) for prompt in prompts))
        pruning = threading.Thread(target=retention.prune, args=(shop.db, shop.blobs, [old]))
        pruning.start()
        while bundle := shop.claim(new, shop.session_id, 4):
            left = shop.link(bundle)
            with shop.db.write() as connection:
                jobs.succeed(connection, [(one, shop._picture(one)) for one in left])
        pruning.join()
        shop.assert_whole()
        assert shop.states(new) == {"succeeded": 40}
        retention.prune(shop.db, shop.blobs, [new])
        assert not shop.stored()


def test_a_lost_claim_is_not_linked(shop: Shop) -> None:
    shop.rendered("a")
    batch_id = shop.batch(spec("a"))
    claim = shop.claim(batch_id, shop.session_id)[0]
    with shop.db.write() as connection:
        jobs.requeue(connection, claim, Invalid("its session was lost"))
    assert shop.link([claim]) == []  # nothing left to do for it
    assert shop.states(batch_id) == {"queued": 1}
    shop.assert_whole()


def test_by_age_the_oldest_first(shop: Shop) -> None:
    young, old, open_one = shop.rendered("a"), shop.rendered("b"), shop.batch(spec("c"))
    with shop.db.write() as connection:
        aged = batches_table.c.finished_at - 3 * DAY
        mine = batches_table.c.id == old
        connection.execute(batches_table.update().where(mine).values(finished_at=aged))
    assert retention.old_batches(shop.db, 2 * DAY) == [old]
    assert retention.old_batches(shop.db, 0.0)[0] == old
    assert set(retention.old_batches(shop.db, -1.0)) == {old, young}
    assert open_one not in retention.old_batches(shop.db, -1.0)


def test_a_dry_run_counts_and_changes_nothing(shop: Shop) -> None:
    batch_id = shop.rendered("a", "bb")
    told = retention.would_prune(shop.db, [batch_id])
    assert (told.batches, told.jobs, told.objects, told.bytes) == (1, 2, 2, 3)
    assert shop.states(batch_id) == {"succeeded": 2}
    assert len(shop.stored()) == 2


INPUT = f"inputs/{'a' * 64}.png"


def test_an_input_picture_goes_with_the_last_batch_that_names_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.blobs.put(INPUT, b"picture", "image/png")
    one, other = (shop.rendered(p, init_image=INPUT, strength=0.5) for p in ("a", "b"))
    assert shop.count(batch_inputs) == 2
    retention.prune(shop.db, shop.blobs, [one])
    assert INPUT in shop.stored()
    now = time.time()
    monkeypatch.setattr(LATER, lambda: now + 2 * DAY)
    retention.prune(shop.db, shop.blobs, [other])
    assert not shop.stored()
    assert shop.count(batch_inputs) == 0


def test_an_input_picture_that_was_just_written_stays(shop: Shop) -> None:
    """A submit that is under way has seen that it is there."""
    shop.blobs.put(INPUT, b"picture", "image/png")
    batch_id = shop.rendered("a", init_image=INPUT, strength=0.5)
    retention.prune(shop.db, shop.blobs, [batch_id])
    assert shop.stored() == {INPUT}


@pytest.fixture
def orphaned(
    shop: Shop, blob_store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> tuple[Shop, set[str]]:
    """Objects that nothing names among others that something does; and which these are."""
    shop.blobs = blob_store
    monkeypatch.setattr(retention, "STEP", 4)
    kept = shop.rendered(*(f"p{i}" for i in range(6)))
    shop.rendered("p1", "p2")
    shop.blobs.put(INPUT, b"picture", "image/png")
    shop.rendered("with", init_image=INPUT, strength=0.5)
    gone = shop.rendered("shared", "alone")
    shop.rendered("shared")
    with shop.db.write() as connection:
        connection.execute(batches_table.delete().where(batches_table.c.id == gone))
    running = shop.batch(spec("running"))
    shop._picture(shop.claim(running, shop.session_id)[0])  # stored, not recorded yet
    shop.blobs.put("notes/mine.txt", b"another's", "text/plain")
    shop.blobs.put("pictures/strange.txt", b"another's", "text/plain")
    orphans = {
        object_key(JobRef(kept, 0), 7, "5e" * 16, "png"),
        object_key(JobRef(gone, 1), 1, shop.session_id, "png"),
        object_key(JobRef("0" * 16, 5), 1, "5e" * 16, "webp"),
        f"inputs/{'b' * 64}.webp",
    }
    for key in orphans:
        shop.blobs.put(key, b"12345", "image/png")
    return shop, orphans


def test_orphans_are_found_and_removed(
    orphaned: tuple[Shop, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, orphans = orphaned
    before = shop.stored()
    assert retention.prune_orphans(shop.db, shop.blobs).objects == 0  # all are young
    now = time.time()
    monkeypatch.setattr(LATER, lambda: now + 2 * DAY)
    told = retention.prune_orphans(shop.db, shop.blobs, dry_run=True)
    assert (told.objects, told.bytes) == (4, 20)
    assert shop.stored() == before
    assert retention.prune_orphans(shop.db, shop.blobs).objects == 4
    assert shop.stored() == before - orphans
    shop.assert_whole()


def test_orphans_are_not_looked_for_where_all_would_be(shop: Shop) -> None:
    with pytest.raises(Invalid, match="holds no batch"):
        retention.prune_orphans(shop.db, shop.blobs)
    with pytest.raises(InvalidParameter, match="an hour"):
        retention.prune_orphans(shop.db, shop.blobs, older_than_s=60)


def test_an_input_picture_that_is_taken_again_is_young_again(tmp_path: Path) -> None:
    from farm.inputs import store

    blobs = LocalBlobs(tmp_path)
    store(blobs, INPUT, b"picture")
    long_ago = time.time() - DAY
    os.utime(tmp_path / INPUT, (long_ago, long_ago))
    store(blobs, INPUT, b"picture")
    found = blobs.stat(INPUT)
    assert found
    assert found.modified > long_ago + 3600


def test_a_picture_that_was_linked_often_is_found_by_one_look_at_the_index(shop: Shop) -> None:
    for _ in range(3):
        shop.rendered("a")
    batch_id, marks = shop.batch(spec("a")), [_fingerprint(spec("a")), "0"]
    with shop.db.read() as connection:
        found = reuse.rendered(connection, batch_id, marks)
        assert set(found) == {marks[0]}
        assert reads.job(connection, found[marks[0]]).state == JobState.SUCCEEDED
