"""A job goes to another worker than the one that failed it, if there is one. On both databases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, text, update

from farm.catalog import Lane
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import EngineKilled, FarmError, RenderFailed, StorageUnavailable
from farm.store import jobs, sessions
from farm.store.jobs import Claim
from farm.store.sessions import Beat
from farm.store.tables import counts, now
from farm.store.tables import jobs as jobs_table
from farm.store.tables import sessions as sessions_table
from farm.verdict import give_back, settle_failure
from tests.store_kit import LANE, Kit, spec

SETTINGS = Settings(max_failures=5, retry_delay_s=0.0)
OTHER_ENGINE = Lane(LANE.model, "sdcpp")
FAULTS = [RenderFailed("odd"), EngineKilled("SIGKILL"), StorageUnavailable("away from here")]


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


def claim(kit: Kit, session: str, limit: int = 4, lane: Lane = LANE) -> list[Claim]:
    return claim_bundle(kit.db, session, lane, limit)


def fail(kit: Kit, held: Claim, error: FarmError | None = None) -> None:
    with kit.db.write() as connection:
        assert settle_failure(connection, held, error or RenderFailed("odd"), SETTINGS)


def failed_by(kit: Kit, session: str, **asked: object) -> Claim:
    """A job that this session has just failed."""
    kit.batch(spec(**asked))
    (held,) = claim(kit, session)
    fail(kit, held)
    return held


def become(kit: Kit, session: str, **values: Any) -> None:
    with kit.db.write() as connection:
        mine = sessions_table.c.id == session
        connection.execute(update(sessions_table).where(mine).values(values))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code)
def test_a_job_goes_to_another_worker_than_the_one_that_failed_it(
    kit: Kit, fault: FarmError
) -> None:
    kit.batch(spec())
    one, two = kit.session(), kit.session()
    (held,) = claim(kit, one)
    fail(kit, held, fault)
    assert claim(kit, one) == []
    (again,) = claim(kit, two)
    assert again.ref == held.ref
    fail(kit, again, fault)
    assert claim(kit, two) == [], "now it is the other way round"
    assert [c.ref for c in claim(kit, one)] == [held.ref]


def test_who_is_alone_tries_again_at_once(kit: Kit) -> None:
    session = kit.session()
    failed_by(kit, session)
    assert len(claim(kit, session)) == 1


@pytest.mark.parametrize("state", ["resting", "waiting"])
def test_a_worker_that_takes_no_jobs_does_not_count(kit: Kit, state: str) -> None:
    one, two = kit.session(), kit.session()
    failed_by(kit, one)
    with kit.db.write() as connection:
        assert sessions.beat(connection, two, 30.0, Beat(state))
    assert len(claim(kit, one)) == 1


@pytest.mark.parametrize("end", ["closed_at", "expires_at"])
def test_a_worker_that_has_gone_does_not_count(kit: Kit, end: str) -> None:
    one, two = kit.session(), kit.session()
    failed_by(kit, one)
    assert claim(kit, one) == []
    become(kit, two, **{end: 1.0})
    assert len(claim(kit, one)) == 1


def test_only_a_worker_that_may_take_the_job_counts(kit: Kit) -> None:
    one = kit.session()
    kit.session(lane=Lane("other", "fake"))
    kit.session(lane=OTHER_ENGINE)
    failed_by(kit, one, engine="fake")
    assert len(claim(kit, one)) == 1, "the other engine was not asked for"
    failed_by(kit, one)
    assert claim(kit, one) == [], "any engine of the model was asked for"


def test_a_worker_with_too_little_memory_does_not_count(kit: Kit) -> None:
    large, small = kit.session(memory=32), kit.session(memory=8)
    held = failed_by(kit, large)
    with kit.db.write() as connection:
        mine = jobs_table.c.batch_id == held.ref.batch_id
        connection.execute(update(jobs_table).where(mine).values(needs_memory=16))
    assert claim(kit, small) == []
    (again,) = claim(kit, large)
    fail(kit, again)
    kit.session(memory=64)
    assert claim(kit, large) == []


def test_no_job_waits_for_a_worker_that_never_comes(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = kit.session(), kit.session()
    held = failed_by(kit, one)
    assert claim(kit, one) == []
    with kit.db.write() as connection:
        mine = jobs_table.c.batch_id == held.ref.batch_id
        connection.execute(update(jobs_table).where(mine).values(not_before=now() - 61.0))
    assert len(claim(kit, one)) == 1


def test_what_another_gave_back_free_is_anyones(kit: Kit) -> None:
    one, two = kit.session(), kit.session()
    failed_by(kit, one)
    (held,) = claim(kit, two)
    with kit.db.write() as connection:
        assert give_back(connection, held, "its worker was shut down")
    assert len(claim(kit, one)) == 1


def test_avoided_jobs_hide_no_others(kit: Kit) -> None:
    one, _ = kit.session(), kit.session()
    for _ in range(20):  # more batches than a claim looks into
        failed_by(kit, one)
    free = kit.batch(spec("free"))
    assert [c.ref.batch_id for c in claim(kit, one)] == [free]
    mixed = kit.batch(*(spec(f"p{i}") for i in range(4)))
    (first,) = claim(kit, one, limit=1)
    fail(kit, first)
    assert [c.ref.idx for c in claim(kit, one)] == [1, 2, 3]
    assert first.ref.batch_id == mixed


def test_a_person_s_retry_is_for_anyone(kit: Kit) -> None:
    one, _ = kit.session(), kit.session()
    held = failed_by(kit, one)
    with kit.db.write() as connection:
        jobs.request_cancel(connection, held.ref.batch_id)
        jobs.redrive(connection, held.ref.batch_id, ["cancelled"])  # type: ignore[list-item]
    assert len(claim(kit, one)) == 1


def test_a_claim_costs_no_more_for_it(kit: Kit) -> None:
    """Nine statements, and what is avoided is passed by in the queue's own index."""
    one, _ = kit.session(), kit.session()
    batch = kit.batch(spec())
    fail(kit, *claim(kit, one))
    sql = (
        "INSERT INTO jobs (batch_id, idx, model, key, prompt, seed, avoid_session, not_before) "
        "WITH RECURSIVE n(i) AS (SELECT 300 UNION ALL SELECT i + 1 FROM n WHERE i < 4000) "
        f"SELECT '{batch}', i, 'shapes', 'k', 'p', 1, "
        f"CASE WHEN i < 3000 THEN '{one}' END, {time.time()} FROM n"
    )
    with kit.db.write() as connection:
        connection.execute(text(sql))
        connection.execute(update(counts).values(queued=3702))
        if connection.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))
    seen: list[tuple[str, Any]] = []

    @event.listens_for(kit.db.engine, "before_cursor_execute")
    def note(conn, cursor, statement, parameters, context, many):  # type: ignore[no-untyped-def]
        seen.append((statement, parameters))

    found = claim(kit, one)
    event.remove(kit.db.engine, "before_cursor_execute", note)
    assert [c.ref.idx for c in found] == [3000, 3001, 3002, 3003]
    asked = [(s, p) for s, p in seen if not s.startswith(("BEGIN", "PRAGMA"))]
    assert len(asked) <= 9, [s for s, _ in asked]
    heads = [(s, p) for s, p in asked if "jobs.suspect" in s and s.startswith("SELECT")]
    explain = "EXPLAIN " if kit.db.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with kit.db.read() as connection:
        first, parameters = heads[0]
        plan = str(connection.exec_driver_sql(explain + first, parameters).all())
    assert "ix_jobs_queued" in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan
