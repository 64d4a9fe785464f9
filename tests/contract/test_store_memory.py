"""Jobs that did not fit into a worker's memory: who takes them next, and when nobody can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, update

from farm.catalog import Lane
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import OutOfMemory
from farm.reconcile import reconcile
from farm.store import jobs, reads, sessions
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from farm.store.reads import Job
from farm.store.tables import jobs as jobs_table
from farm.store.tables import sessions as sessions_table
from farm.verdict import settle_failure
from tests.store_kit import LANE, Kit, spec

SETTINGS = Settings(retry_delay_s=0.0)
OTHER = Lane("shapes", "diffusers")
SMALL, LARGE = 8 * 10**9, 24 * 10**9


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


def out_of_memory(kit: Kit, held: Claim) -> Job:
    """The job after a final OutOfMemory."""
    with kit.db.write() as connection:
        assert settle_failure(connection, held, OutOfMemory("64x64 is too much"), SETTINGS)
    with kit.db.read() as connection:
        return reads.job(connection, held.ref)


def needs(kit: Kit, ref: JobRef) -> int | None:
    with kit.db.read() as connection:
        mine = (jobs_table.c.batch_id == ref.batch_id, jobs_table.c.idx == ref.idx)
        memory: int | None = connection.scalar(
            jobs_table.select().with_only_columns(jobs_table.c.needs_memory).where(*mine)
        )
        return memory


def test_it_goes_to_a_worker_with_more_memory_and_no_failure_is_counted(kit: Kit) -> None:
    small, large = kit.session(memory=SMALL), kit.session(memory=LARGE)
    batch = kit.batch(spec("big"), spec("small", width=32))
    (held,) = claim_bundle(kit.db, small, LANE, 1)
    job = out_of_memory(kit, held)
    assert (job.state, job.failures, needs(kit, held.ref)) == ("queued", 0, SMALL)
    assert job.error == "64x64 is too much; it waits for a worker with more than 8 GB"
    assert [c.ref.idx for c in claim_bundle(kit.db, small, LANE, 4)] == [1], "not to the same"
    assert claim_bundle(kit.db, small, LANE, 4) == []
    assert claim_bundle(kit.db, kit.session(memory=SMALL), LANE, 4) == [], "nor to its equal"
    assert claim_bundle(kit.db, kit.session(), LANE, 4) == [], "nor to who knows what"
    (again,) = claim_bundle(kit.db, large, LANE, 4)
    assert again.ref == held.ref
    job = out_of_memory(kit, again)
    assert (job.state, job.failures, job.error_code) == ("failed", 1, "ERR_OUT_OF_MEMORY")
    assert kit.states(batch) == {"failed": 1, "running": 1}


@pytest.mark.parametrize("memory", [None, LARGE])
def test_it_fails_where_nobody_has_more(kit: Kit, memory: int | None) -> None:
    session = kit.session(memory=memory)
    kit.session(memory=LARGE)
    kit.session(lane=Lane("other", "fake"), memory=10 * LARGE)
    kit.batch(spec())
    (held,) = claim_bundle(kit.db, session, LANE, 1)
    assert out_of_memory(kit, held).state == "failed"


def test_only_the_engine_that_it_asks_for_counts(kit: Kit) -> None:
    small = kit.session(memory=SMALL)
    large = kit.session(lane=OTHER, memory=LARGE)
    kit.batch(spec("any"), spec("this", engine="fake"))
    one, two = (claim_bundle(kit.db, small, LANE, 1)[0] for _ in range(2))
    held = {claim.spec.engine: claim for claim in (one, two)}
    assert out_of_memory(kit, held["fake"]).state == "failed"
    assert out_of_memory(kit, held[None]).state == "queued"
    assert [c.spec.prompt for c in claim_bundle(kit.db, large, OTHER, 4)] == ["any"]


def test_a_need_that_no_worker_meets_any_more_is_dropped(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = kit.session(memory=SMALL), kit.session(memory=LARGE)
    kit.batch(*(spec(str(i)) for i in range(3)))
    for held in claim_bundle(kit.db, small, LANE, 3):
        out_of_memory(kit, held)
    reconcile(kit.db, SETTINGS)
    assert claim_bundle(kit.db, small, LANE, 3) == [], "the large worker lives"
    with kit.db.write() as connection:
        sessions.close(connection, large)
    reconcile(kit.db, SETTINGS)
    assert claim_bundle(kit.db, small, LANE, 3) == [], "it may be restarting"
    monkeypatch.setattr(sessions, "AWAY_S", 0.0)
    reconcile(kit.db, SETTINGS, lenient=True)
    assert claim_bundle(kit.db, small, LANE, 3) == [], "after an outage nobody has beaten yet"
    reconcile(kit.db, SETTINGS)
    again = claim_bundle(kit.db, small, LANE, 3)
    assert len(again) == 3
    assert out_of_memory(kit, again[0]).state == "failed"


def test_a_person_s_retry_begins_anew(kit: Kit) -> None:
    small = kit.session(memory=SMALL)
    kit.session(memory=LARGE)
    batch = kit.batch(spec())
    (held,) = claim_bundle(kit.db, small, LANE, 1)
    out_of_memory(kit, held)
    with kit.db.write() as connection:
        jobs.request_cancel(connection, batch)
        jobs.redrive(connection, batch, ["cancelled"])  # type: ignore[list-item]
    assert needs(kit, held.ref) is None
    assert len(claim_bundle(kit.db, small, LANE, 1)) == 1


def test_the_queue_s_index_serves_claims_and_the_needy_have_one_of_their_own(
    tmp_path: Path,
) -> None:
    """On SQLite: PostgreSQL scans a small table, whatever its indexes."""
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    seen: list[str] = []

    def plan(statement: str) -> str:
        with kit.db.read() as connection:
            rows = connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement).all()
            return " ".join(str(row[-1]) for row in rows)

    @event.listens_for(kit.db.engine, "before_cursor_execute")
    def note(conn, cursor, statement, parameters, context, many):  # type: ignore[no-untyped-def]
        values = iter(parameters)
        if "FROM jobs" in statement and "needs_memory" in statement and "EXPLAIN" not in statement:
            seen.append("".join(repr(next(values)) if c == "?" else c for c in statement))

    kit.batch(spec())
    claim_bundle(kit.db, kit.session(memory=SMALL), LANE, 4)
    with kit.db.read() as connection:
        jobs.memory_needs(connection)
    claims, needy = seen[:-1], seen[-1]
    assert len(claims) >= 2
    assert all("ix_jobs_queued" in plan(statement) for statement in claims), claims
    assert "ix_jobs_needs_memory" in plan(needy)
    kit.db.close()


def test_the_last_session_of_a_lane_here(kit: Kit) -> None:
    older = kit.session(memory=1, n=1)
    with kit.db.write() as connection:
        mine = sessions_table.c.id == older
        connection.execute(update(sessions_table).where(mine).values(opened_at=1.0))
    kit.session(memory=2, n=2)
    kit.session(lane=OTHER, memory=3, n=3)
    with kit.db.read() as connection:
        for device in ("", "cpu"):
            found = sessions.last(connection, LANE, "h", device)
            assert found
            assert (found.device, found.memory, found.info) == ("cpu", 2, {"n": 2})
        assert sessions.last(connection, LANE, "elsewhere", "") is None
        assert sessions.last(connection, LANE, "h", "cuda") is None
