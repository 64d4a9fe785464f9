"""Recorder, claims and heart, each alone: SQLite in a temporary file, no service."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farm import dispatch
from farm.config import Settings
from farm.errors import DatabaseUnavailable, RenderFailed
from farm.store import jobs, reads, sessions
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from tests.servers import poll
from tests.store_kit import LANE, PICTURE, Kit, spec
from workers import claims as claims_module
from workers.claims import Claims
from workers.heart import Heart
from workers.recorder import Recorder

SETTINGS = Settings(retry_delay_s=0.0)


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    yield kit
    kit.db.close()


@pytest.fixture
def lost() -> list[Claim]:
    return []


@pytest.fixture
def recorder(kit: Kit, lost: list[Claim]) -> Iterator[Recorder]:
    recorder = Recorder(kit.db, SETTINGS, lambda claim, picture: lost.append(claim))
    yield recorder
    assert recorder.close(10)


def soon(ready: Callable[[], bool]) -> None:
    poll(ready, "the record", 10)


def state(kit: Kit, ref: JobRef) -> str:
    with kit.db.read() as connection:
        return reads.job(connection, ref).state


def test_a_group_is_written_together(kit: Kit, recorder: Recorder) -> None:
    batch = kit.batch(*(spec(str(i)) for i in range(10)))
    claims = kit.claim(batch, kit.session(), limit=10)
    recorder.started(claims)
    recorder.progress(claims[:2], 0.5)
    for claim in claims[:8]:
        recorder.pictures([(claim, PICTURE)])
    recorder.failure(claims[8], RenderFailed("odd"))
    recorder.back(claims[9], "shut down")
    soon(lambda: kit.states(batch) == {"succeeded": 8, "queued": 2})


def test_a_picture_s_record_notes_a_start_that_was_not_yet_recorded(
    kit: Kit, recorder: Recorder
) -> None:
    batch = kit.batch(spec("a"), spec("b"))
    quick, slow = kit.claim(batch, kit.session(), limit=2)
    recorder._changed.acquire()  # so that all of it is one group
    recorder.started([quick, slow])
    recorder.pictures([(quick, PICTURE)])
    recorder._changed.release()
    soon(lambda: kit.states(batch) == {"succeeded": 1, "running": 1})
    with kit.db.read() as connection:
        quick_job, slow_job = (reads.job(connection, claim.ref) for claim in (quick, slow))
    assert quick_job.started_at is not None
    assert quick_job.started_at <= (quick_job.finished_at or 0)
    assert slow_job.started_at is not None, "a suspect, should its worker die now"


def test_one_refused_record_does_not_spoil_the_others(kit: Kit, recorder: Recorder) -> None:
    batch = kit.batch(spec("a"), spec("b"), spec("c"))
    one, two, three = kit.claim(batch, kit.session(), limit=3)
    recorder.pictures([(one, PICTURE)])
    recorder.pictures([(two, Picture("key", None, 1, 0.1, "f"))])  # type: ignore[arg-type]
    recorder.pictures([(three, PICTURE)])
    soon(lambda: kit.states(batch) == {"succeeded": 2, "queued": 1})
    with kit.db.read() as connection:
        assert "could not be recorded" in (reads.job(connection, two.ref).error or "")


def test_a_lost_claim_s_picture_is_dropped(kit: Kit, recorder: Recorder, lost: list[Claim]) -> None:
    batch = kit.batch(spec())
    (ghost,) = kit.claim(batch, kit.session())
    with kit.db.write() as connection:
        jobs.requeue(connection, ghost, RenderFailed("expired"))
    recorder.pictures([(ghost, PICTURE)])
    soon(lambda: lost == [ghost])
    assert kit.states(batch) == {"queued": 1}


def test_a_claim_whose_answer_was_lost_goes_back(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, session = kit.batch(spec("a"), spec("b")), kit.session()
    claims = Claims(kit.db, LANE, lambda: session)
    real = dispatch.claim_bundle

    def unanswered(*args: object) -> list[Claim]:
        real(*args)  # type: ignore[arg-type]
        raise DatabaseUnavailable("the connection died after the commit")

    monkeypatch.setattr(dispatch, "claim_bundle", unanswered)
    assert claims.next(1) == []
    assert kit.states(batch) == {"queued": 1, "running": 1}
    monkeypatch.setattr(dispatch, "claim_bundle", real)
    claims.tend()
    assert kit.states(batch) == {"queued": 2}, "also when nobody asks for more"
    bundle = claims.next(8)
    assert {claim.ref.idx for claim in bundle} == {0, 1}
    claims._sweep(session)
    assert kit.states(batch) == {"running": 2}, "what it knows it keeps"
    claims.forget(bundle)
    claims._sweep(session)
    assert kit.states(batch) == {"queued": 2}


def test_no_more_is_claimed_while_too_many_claims_have_not_ended(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, session = kit.batch(*(spec(str(i)) for i in range(6))), kit.session()
    monkeypatch.setattr(claims_module, "MOST_OPEN", 4)
    claims = Claims(kit.db, LANE, lambda: session)
    bundle = claims.next(3)
    assert (len(bundle), claims.next(3)) == (3, [])
    claims.forget(bundle[:2])
    assert len(claims.next(3)) == 3
    assert kit.states(batch) == {"running": 6}


def test_the_heart_beats_passes_wishes_on_and_opens_anew_when_lost(kit: Kit) -> None:
    batch = kit.batch(spec("a"), spec("b"))
    wishes: set[JobRef] = set()
    info = {"learnt_cap": 4}
    lost = threading.Event()
    heart = Heart(
        kit.db, LANE, 0.4, device="cpu", memory=7, info=lambda: dict(info), on_lost=lost.set,
        on_cancel=wishes.update, told=lambda: sessions.Beat("rendering", "", 3, 0.5),
    )  # fmt: skip
    heart.start()
    first = heart.session_id
    claims = kit.claim(batch, first, limit=2)
    with kit.db.write() as connection:
        jobs.request_cancel(connection, batch, 1)
    soon(lambda: wishes == {claims[1].ref})

    def seen() -> list[sessions.Worker]:
        with kit.db.read() as connection:
            return sessions.live(connection)

    soon(lambda: [(w.rendered, w.memory, w.info) for w in seen()] == [(3, 7, {"learnt_cap": 4})])
    info["learnt_cap"] = 2
    soon(lambda: [w.info for w in seen()] == [{"learnt_cap": 2}])
    with kit.db.write() as connection:
        sessions.close(connection, first)
    assert lost.wait(10)
    soon(lambda: heart.session_id != first and len(seen()) == 1)
    info["learnt_cap"] = 1
    heart.stop()
    assert seen() == []
    with kit.db.read() as connection:
        last = sessions.last(connection, LANE, socket.gethostname(), "cpu")
    assert last is not None
    assert last.info == {"learnt_cap": 1}, "the last lesson is told with the end"
