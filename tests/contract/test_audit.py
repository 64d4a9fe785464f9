"""What an audit finds, and that it finds nothing where all is well; on both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from farm import audit as audit_room
from farm import retention
from farm.audit import Audited, audit
from farm.blobs import BlobStore
from farm.blobs.local import LocalBlobs
from farm.pictures import object_key, sha256
from farm.store import jobs, prune, sessions
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from farm.store.tables import batches as batches_table
from farm.store.tables import counts as counts_table
from farm.store.tables import sessions as sessions_table
from tests.store_kit import Kit, spec


class Gallery(Kit):
    """A store with a blob store beside it; a picture is its prompt's bytes."""

    blobs: BlobStore

    def rendered(self, *prompts: str) -> str:
        """A batch that is done, each job with its picture."""
        batch_id = self.batch(*(spec(prompt) for prompt in prompts))
        self.finish(self.claim(batch_id, self.session(), 99))
        return batch_id

    def finish(self, held: list[Claim]) -> None:
        with self.db.write() as connection:
            done = [(claim, self.store(claim)) for claim in held]
            assert len(jobs.succeed(connection, done)) == len(held)

    def store(self, claim: Claim) -> Picture:
        data = claim.spec.prompt.encode()
        key = object_key(claim.ref, claim.claim_no, claim.session_id, "png")
        self.blobs.put(key, data, "image/png")
        return Picture(key, sha256(data), len(data), 0.1, claim.spec.fingerprint("fake", "0" * 64))

    def linked(self, source: str) -> str:
        """A batch of one job that has the picture of the first job of `source`."""
        batch_id = self.batch(spec("link"))
        (claim,) = self.claim(batch_id, self.session())
        picture = replace(self.store_of(source), render_s=None)
        with self.db.write() as connection:
            jobs.succeed(connection, [(claim, picture)])
        return batch_id

    def store_of(self, batch_id: str) -> Picture:
        (one, *_) = self.pictures(batch_id)
        return Picture(one.object_key, one.sha256, one.size_bytes or 0, 0.1, "f" * 64)

    def pictures(self, batch_id: str) -> list[audit_room.Recorded]:
        with self.db.read() as connection:
            return audit_room.store.recorded(connection, batch_id, -1, 99)

    def miscount(self, batch_id: str, **wrong: int) -> None:
        with self.db.write() as connection:
            mine = counts_table.c.batch_id == batch_id
            connection.execute(update(counts_table).where(mine).values(**wrong))

    def look(self, *batch_ids: str, **how: bool) -> Audited:
        return audit(self.db, self.blobs, batch_ids or None, **how)  # type: ignore[arg-type]


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Iterator[Gallery]:
    shop = Gallery.at(database_url)
    assert isinstance(shop, Gallery)
    shop.blobs = LocalBlobs(tmp_path / "blobs")
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
    assert finding.mend.startswith(("farm reconcile", "render it again: farm submit --no-reuse"))
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
    left = shop.store(lost)
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
