"""What an audit finds, and that it finds nothing where all is well; on both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from farm import audit as audit_room
from farm import retention
from farm.audit import audit
from farm.blobs import BlobStore
from farm.blobs.local import LocalBlobs
from farm.pictures import object_key
from farm.store import jobs, prune, sessions
from farm.store.ids import JobRef
from farm.store.tables import batches as batches_table
from farm.store.tables import sessions as sessions_table
from tests.gallery_kit import Gallery
from tests.store_kit import spec


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Iterator[Gallery]:
    shop = Gallery.of(database_url, LocalBlobs(tmp_path / "blobs"))
    yield shop
    shop.db.close()


def test_all_is_well(shop: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_room, "PAGE", 2)
    first, second = shop.rendered("a", "b", "c", "d", "e"), shop.rendered("x")
    shop.linked(first)
    shop.claim(shop.batch(spec("running"), spec("queued")), shop.session())
    told = shop.look()
    assert told.ok
    assert told.findings == []
    assert (told.batches, told.pictures, told.objects, told.bytes) == (4, 7, 6, 7)
    assert told.last > second
    assert shop.look(first, quick=True).as_dict()["bytes"] == 0
    with_after = audit(shop.db, shop.blobs, after=first)
    assert (with_after.batches, with_after.pictures) == (3, 2)


def _gone(shop: Gallery, batch_id: str, key: str) -> None:
    shop.blobs.delete([key])


def _shorter(shop: Gallery, batch_id: str, key: str) -> None:
    shop.blobs.put(key, b"", "image/png")


def _flipped(shop: Gallery, batch_id: str, key: str) -> None:
    shop.blobs.put(key, bytes(byte ^ 1 for byte in shop.blobs.get(key)), "image/png")


def _of_another(shop: Gallery, batch_id: str, key: str) -> None:
    other = shop.batch(spec("other"))
    (claim,) = shop.claim(other, shop.session())
    with shop.db.write() as connection:
        jobs.succeed(connection, [(claim, shop.store_of(batch_id))])


def _miscounted(shop: Gallery, batch_id: str, key: str) -> None:
    shop.miscount(batch_id, queued=2)


def _unended(shop: Gallery, batch_id: str, key: str) -> None:
    with shop.db.write() as connection:
        connection.execute(update(batches_table).values(finished_at=None))


def _held(shop: Gallery, batch_id: str, key: str) -> None:
    session = shop.session()
    shop.claim(shop.batch(spec("held")), session)
    with shop.db.write() as connection:
        sessions.close(connection, session)


def _vanished(shop: Gallery, batch_id: str, key: str) -> None:
    shop.claim(shop.batch(spec("held")), shop.session())
    with shop.db.write() as connection:
        connection.execute(sessions_table.delete())


def _orphan(shop: Gallery, batch_id: str, key: str) -> None:
    shop.blobs.put(object_key(JobRef(batch_id, 0), 1, "0" * 32, "png"), b"1", "image/png")


@pytest.mark.parametrize(
    ("harm", "kind", "quick"),
    [
        (_gone, "missing", True),
        (_shorter, "damaged", True),
        (_flipped, "damaged", False),
        (_of_another, "shared", True),
        (_miscounted, "counters", True),
        (_unended, "end", True),
        (_held, "held", True),
        (_vanished, "held", True),
        (_orphan, "orphan", True),
    ],
)
def test_what_is_wrong_is_found_and_how_to_mend_it(
    shop: Gallery, harm: Callable[[Gallery, str, str], None], kind: str, quick: bool
) -> None:
    batch_id = shop.rendered("a", "b")
    harm(shop, batch_id, shop.pictures(batch_id)[0].object_key)
    told = shop.look()
    ends = {"counters": {"end"}}.get(kind, set())  # a count that is wrong may tell a wrong end
    assert set(told.wrong) == {kind} | (ends & set(told.wrong))
    finding = told.findings[0]
    assert finding.kind == kind
    assert finding.about in finding.text
    assert finding.mend.startswith(("farm reconcile", "farm audit --lost"))
    assert shop.look(quick=True).ok == (not quick)


def test_objects_of_nobody_are_wrong_when_they_are_old(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = shop.rendered("a")
    shop.blobs.put(object_key(JobRef("0" * 16, 0), 1, "0" * 32, "png"), b"1", "image/png")
    shop.blobs.put(object_key(JobRef(batch_id, 0), 9, "0" * 32, "png"), b"1", "image/png")
    shop.blobs.put(f"inputs/{'a' * 64}.png", b"1", "image/png")
    shop.blobs.put("notes/mine.txt", b"another's", "text/plain")
    assert shop.look().ok
    now = time.time()
    monkeypatch.setattr("farm.audit.time.time", lambda: now + 2 * 86_400)
    told = shop.look()
    assert told.wrong == {"orphan": 3}
    assert {finding.mend for finding in told.findings} == {"farm prune --orphans"}


def test_what_a_prune_is_about_to_delete_is_no_orphan(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows go first, and its objects after they were listed here."""
    now = time.time()
    monkeypatch.setattr("farm.audit.time.time", lambda: now + 2 * 86_400)
    gone, going = shop.rendered("a"), shop.rendered("b")
    stays = object_key(JobRef("0" * 16, 0), 1, "0" * 32, "png")
    shop.blobs.put(stays, b"1", "image/png")
    listed = list(shop.blobs.list("pictures/"))
    assert len(listed) == 3
    monkeypatch.setattr(shop.blobs, "list", lambda prefix: (o for o in listed if prefix in o.key))
    retention.prune(shop.db, shop.blobs, [gone])
    with shop.db.write() as connection:
        assert prune.step(connection, going, 9).jobs == 1
    assert {finding.about for finding in shop.look().findings} == {stays}


def test_many_findings_are_counted_and_the_first_are_told(
    shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_room, "MOST_FINDINGS", 3)
    batch_id = shop.rendered(*map(str, range(9)))
    shop.blobs.delete(one.object_key for one in shop.pictures(batch_id))
    told = shop.look(batch_id)
    assert (told.wrong["missing"], len(told.findings)) == (9, 3)


def test_an_audit_beside_a_farm_that_renders_and_prunes_finds_nothing(shop: Gallery) -> None:
    ended = threading.Event()

    def live() -> None:
        try:
            for _ in range(4):
                done = shop.rendered(*map(str, range(12)))
                for n in range(6):
                    (claim,) = shop.claim(shop.batch(spec(f"{n}")), shop.session())
                    shop.finish([claim])
                retention.prune(shop.db, shop.blobs, [done])
        finally:
            ended.set()

    life = threading.Thread(target=live)
    life.start()
    looked = 0
    while not ended.is_set() or not looked:
        told = shop.look()
        assert told.ok, told.findings
        looked += 1
    life.join()


def test_the_same_number_of_another_session_is_another_claim(shop: Gallery) -> None:
    """As when the database lost its last commits: the first claim of the job comes twice."""
    batch_id = shop.batch(spec("a"))
    one, two = shop.session(), shop.session()
    (lost,) = shop.claim(batch_id, one)
    left = shop.put(lost)
    with shop.db.write() as connection:  # the database counts on from before that claim
        mine = jobs.jobs.c.batch_id == batch_id
        back = {"state": "queued", "session_id": None, "claim_no": 0, "engine": None}
        connection.execute(update(jobs.jobs).where(mine).values(back))
    shop.miscount(batch_id, queued=1, running=0)
    (held,) = shop.claim(batch_id, two)
    assert held.claim_no == lost.claim_no
    with shop.db.read() as connection:
        mine_too = object_key(held.ref, held.claim_no, two, "png")
        assert prune.named_pictures(connection, [left.object_key, mine_too]) == {mine_too}
    shop.finish([held])
    assert shop.look().wrong == {"orphan": 1}
    assert retention.prune_passed(shop.db, shop.blobs).objects == 1
    assert shop.look().ok


def test_on_every_blob_store(tmp_path: Path, blob_store: BlobStore) -> None:
    shop = Gallery.of(f"sqlite:///{tmp_path / 'farm.db'}", blob_store)
    batch_id = shop.rendered("whole", "gone", "flipped")
    _, gone, flipped = (one.object_key for one in shop.pictures(batch_id))
    assert shop.look().ok
    _gone(shop, batch_id, gone)
    _flipped(shop, batch_id, flipped)
    _orphan(shop, batch_id, gone)
    lost: list[JobRef] = []
    told = audit(shop.db, shop.blobs, lost=lost.append)
    assert told.wrong == {"missing": 1, "damaged": 1, "orphan": 1}
    assert lost == [JobRef(batch_id, 1), JobRef(batch_id, 2)]
    assert retention.prune_passed(shop.db, shop.blobs, dry_run=True).objects == 1
    assert retention.prune_passed(shop.db, shop.blobs).objects == 1
    assert shop.look(batch_id).wrong == {"missing": 1, "damaged": 1}
    shop.db.close()
