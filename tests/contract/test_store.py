"""The store's promises, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import IntegrityError

from farm.catalog import Lane
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import (
    DatabaseUnavailable,
    EngineCrashed,
    EngineKilled,
    FarmError,
    InvalidConfig,
    InvalidPrompt,
    JobCancelled,
    NotFound,
    RenderFailed,
    StorageUnavailable,
    WorkerLost,
)
from farm.reconcile import reconcile, remove_abandoned
from farm.states import TRANSITIONS, JobState
from farm.store import batches, jobs, reads, schema, sessions, turns
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.tables import batches as batches_table
from farm.store.tables import jobs as jobs_table
from farm.verdict import give_back, settle_failure
from tests.store_kit import LANE, PICTURE, Kit, spec

SETTINGS = Settings(max_failures=3, retry_delay_s=0.0)


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


def test_schema_equals_the_tables_and_goes_down_again(kit: Kit) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.command import downgrade
    from alembic.runtime.migration import MigrationContext

    from farm.store.tables import metadata

    assert schema.current(kit.db) == schema.head()
    with kit.db.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    config = schema._config()
    with kit.db.write() as connection:
        config.attributes["connection"] = connection
        downgrade(config, "base")
    assert schema.current(kit.db) is None
    schema.upgrade(kit.db)
    assert kit.batch(spec())


def test_the_plain_way(kit: Kit) -> None:
    batch = kit.batch(spec("one", seed=7), spec("two", format="webp"))
    session = kit.session()
    one, two = kit.claim(batch, session, limit=8)
    assert one.spec == spec("one", seed=7)
    assert two.spec == spec("two", format="webp")
    assert kit.states(batch) == {"running": 2}
    with kit.db.write() as connection:
        jobs.mark_started(connection, [one])
        assert jobs.succeed(connection, [(one, PICTURE), (two, PICTURE)]) == {one.ref, two.ref}
    assert kit.states(batch) == {"succeeded": 2}
    with kit.db.read() as connection:
        status = batches.status(connection, batch)
        job = reads.job(connection, one.ref)
    assert status.done
    assert status.finished_at is not None
    assert (job.state, job.object_key, job.progress) == ("succeeded", PICTURE.object_key, 1.0)


def test_a_batch_is_not_claimed_before_it_is_whole_nor_while_paused(kit: Kit) -> None:
    held = kit.batch(spec(), ready=False)
    paused = kit.batch(spec())
    with kit.db.write() as connection:
        batches.set_paused(connection, paused, True)
        assert turns.candidates(connection, LANE) == []
        assert turns.backlog(connection) == {}
        batches.set_paused(connection, paused, False)
        batches.release(connection, held, 1)
        assert {row.id for row in turns.candidates(connection, LANE)} == {held, paused}
        assert turns.backlog(connection) == {("shapes", ""): 2}


def test_priority_then_fewest_running_then_age(kit: Kit) -> None:
    first, second = kit.batch(spec(), spec()), kit.batch(spec(), spec())
    urgent = kit.batch(spec(), priority=5)

    def order() -> list[str]:
        with kit.db.read() as connection:
            return [row.id for row in turns.candidates(connection, LANE)]

    assert order()[0] == urgent
    kit.claim(urgent, kit.session())
    assert order() == sorted([first, second])
    ahead, behind = order()
    kit.claim(ahead, kit.session())
    assert order() == [behind, ahead]


def test_a_job_that_asks_for_an_engine_goes_to_no_other(kit: Kit) -> None:
    sdcpp, diffusers = Lane("shapes", "sdcpp"), Lane("shapes", "diffusers")
    asks = [None, "sdcpp", None, "diffusers", "sdcpp"]
    batch = kit.batch(*[spec(f"{n}", engine=engine) for n, engine in enumerate(asks)])
    with kit.db.read() as connection:
        found = [row.asked_engine for row in turns.candidates(connection, sdcpp)]
        assert turns.backlog(connection) == {
            ("shapes", ""): 2, ("shapes", "sdcpp"): 2, ("shapes", "diffusers"): 1,
        }  # fmt: skip
    assert found == ["sdcpp", ""]
    session = kit.session(lane=sdcpp)
    claims = kit.claim(batch, session, limit=9, lane=sdcpp, asked="sdcpp")
    assert [claim.spec.engine for claim in claims] == ["sdcpp", "sdcpp"]
    claims += kit.claim(batch, session, limit=9, lane=sdcpp)
    assert [claim.ref.idx for claim in claims] == [1, 4, 0, 2]
    assert kit.states(batch) == {"running": 4, "queued": 1}
    with kit.db.read() as connection:
        assert turns.candidates(connection, sdcpp) == []
        assert [r.asked_engine for r in turns.candidates(connection, diffusers)] == ["diffusers"]
    with kit.db.write() as connection:
        jobs.lock(connection, claims)
        assert jobs.requeue(connection, claims[0], RenderFailed("x"))
        assert jobs.fail(connection, claims[2], RenderFailed("x"))
        assert jobs.request_cancel(connection, batch) == (2, 2)
    assert kit.states(batch) == {"running": 2, "failed": 1, "cancelled": 2}


def test_a_bundle_has_one_key_in_order(kit: Kit) -> None:
    wide = spec(width=128)
    batch = kit.batch(spec("a"), wide, spec("b"), wide, spec("c"))
    claims = kit.claim(batch, kit.session(), limit=10)
    assert [c.ref.idx for c in claims] == [0, 2, 4]
    assert [c.ref.idx for c in kit.claim(batch, kit.session(), limit=10)] == [1, 3]
    assert kit.claim(batch, kit.session(), limit=10) == []


def test_only_due_jobs_are_claimed(kit: Kit) -> None:
    batch = kit.batch(spec())
    (held,) = kit.claim(batch, kit.session())
    with kit.db.write() as connection:
        assert jobs.requeue(connection, held, RenderFailed("x"), count=True, delay_s=3600)
    assert kit.claim(batch, kit.session()) == []


def test_claim_no_only_grows_and_a_ghost_changes_nothing(kit: Kit) -> None:
    batch = kit.batch(spec())
    ghost_session, new_session = kit.session(), kit.session()
    (ghost,) = kit.claim(batch, ghost_session)
    with kit.db.write() as connection:
        assert give_back(connection, ghost, "shut down")
    (held,) = kit.claim(batch, new_session)
    assert held.claim_no == ghost.claim_no + 1
    with kit.db.write() as connection:
        assert jobs.succeed(connection, [(ghost, PICTURE)]) == set()
        assert not jobs.fail(connection, ghost, RenderFailed("late"))
        assert not jobs.requeue(connection, ghost, RenderFailed("late"))
        assert not jobs.cancel_running(connection, ghost)
        jobs.mark_started(connection, [ghost])
        jobs.record_progress(connection, [(ghost, 0.5)])
    with kit.db.read() as connection:
        job = reads.job(connection, held.ref)
    assert (job.state, job.started_at, job.progress) == ("running", None, 0.0)
    assert kit.states(batch) == {"running": 1}
    with kit.db.write() as connection:
        assert jobs.succeed(connection, [(held, PICTURE)]) == {held.ref}
        other = replace(PICTURE, object_key="pictures/other.png")
        assert jobs.succeed(connection, [(ghost, other)]) == set()
    assert kit.states(batch) == {"succeeded": 1}


def test_a_record_whose_answer_was_lost_is_not_taken_for_a_lost_claim(kit: Kit) -> None:
    batch = kit.batch(spec())
    (held,) = kit.claim(batch, kit.session())
    for _ in range(2):  # the second time as after a commit that was never answered
        with kit.db.write() as connection:
            assert jobs.succeed(connection, [(held, PICTURE)]) == {held.ref}
    assert kit.states(batch) == {"succeeded": 1}


def test_the_same_session_with_an_older_claim_is_a_ghost_too(kit: Kit) -> None:
    batch, session = kit.batch(spec()), kit.session()
    (old,) = kit.claim(batch, session)
    with kit.db.write() as connection:
        give_back(connection, old, "shut down")
    (new,) = kit.claim(batch, session)
    with kit.db.write() as connection:
        assert jobs.succeed(connection, [(old, PICTURE)]) == set()
        assert jobs.succeed(connection, [(new, PICTURE)]) == {new.ref}


@pytest.mark.parametrize(
    ("error", "states", "failures"),
    [
        (InvalidPrompt("no"), {"failed": 1}, 1),
        (StorageUnavailable("away"), {"queued": 1}, 0),
        (RenderFailed("odd"), {"queued": 1}, 1),
        (EngineCrashed("abort"), {"queued": 1}, 1),
        (EngineKilled(), {"queued": 1}, 1),
        (JobCancelled(), {"queued": 1}, 0),
    ],
)
def test_failures_by_class(kit: Kit, error, states, failures) -> None:  # type: ignore[no-untyped-def]
    batch = kit.batch(spec())
    (held,) = kit.claim(batch, kit.session())
    with kit.db.write() as connection:
        assert settle_failure(connection, held, error, SETTINGS)
    assert kit.states(batch) == states
    with kit.db.read() as connection:
        job = reads.job(connection, held.ref)
        (event,) = reads.history(connection, held.ref)
    assert job.failures == failures
    assert event["code"] == error.code


def test_failures_are_used_up(kit: Kit) -> None:
    batch = kit.batch(spec())
    for attempt in range(SETTINGS.max_failures):
        assert kit.states(batch) == {"queued": 1}, attempt
        (held,) = kit.claim(batch, kit.session())
        with kit.db.write() as connection:
            assert settle_failure(connection, held, RenderFailed("odd"), SETTINGS)
    assert kit.states(batch) == {"failed": 1}


def test_a_suspect_runs_alone_and_is_failed_if_it_kills_again(kit: Kit) -> None:
    batch = kit.batch(spec("poison"), spec("good"))
    for attempt in range(2):
        claims = kit.claim(batch, kit.session(), limit=8)
        assert len(claims) == (2 if attempt == 0 else 1)
        with kit.db.write() as connection:
            assert settle_failure(connection, claims[0], EngineCrashed("SIGABRT"), SETTINGS)
            for other in claims[1:]:
                jobs.succeed(connection, [(other, PICTURE)])
    assert kit.states(batch) == {"failed": 1, "succeeded": 1}
    with kit.db.read() as connection:
        job = reads.job(connection, JobRef(batch, 0))
    assert (job.error_code, job.error) == ("ERR_ENGINE_CRASHED", "SIGABRT")


@pytest.mark.parametrize("error", [EngineKilled("SIGKILL"), WorkerLost()])
def test_what_struck_from_outside_uses_up_a_suspects_tries(kit: Kit, error: FarmError) -> None:
    batch = kit.batch(spec())
    for attempt in range(SETTINGS.max_failures):
        (held,) = kit.claim(batch, kit.session())
        assert held.suspect is (attempt > 0)
        with kit.db.write() as connection:
            assert settle_failure(connection, held, error, SETTINGS)
    with kit.db.read() as connection:
        job = reads.job(connection, held.ref)
    assert (job.state, job.error_code, job.error) == ("failed", error.code, error.message)


def test_cancel_before_and_during(kit: Kit) -> None:
    batch, session = kit.batch(spec("a"), spec("b"), spec("c")), kit.session()
    (held,) = kit.claim(batch, session)
    with kit.db.write() as connection:
        assert jobs.request_cancel(connection, batch) == (2, 1)
        assert jobs.request_cancel(connection, batch) == (0, 0)
        assert sessions.cancels(connection, session) == {held.ref}
    assert kit.states(batch) == {"running": 1, "cancelled": 2}
    with kit.db.write() as connection:
        assert settle_failure(connection, held, JobCancelled(), SETTINGS)
    assert kit.states(batch) == {"cancelled": 3}


def test_redrive_by_state_and_code(kit: Kit) -> None:
    batch = kit.batch(spec("a"), spec("b"), spec("c"))
    for error in (InvalidPrompt("x"), RenderFailed("y")):
        (held,) = kit.claim(batch, kit.session())
        with kit.db.write() as connection:
            assert jobs.fail(connection, held, error)
    with kit.db.write() as connection:
        jobs.request_cancel(connection, batch, 2)
        assert batches.status(connection, batch).done
        assert jobs.redrive(connection, batch, [JobState.FAILED], code="ERR_RENDER_FAILED") == 1
        assert not batches.status(connection, batch).done
        assert batches.status(connection, batch).finished_at is None
    assert kit.states(batch) == {"failed": 1, "queued": 1, "cancelled": 1}
    with kit.db.write() as connection:
        both = [JobState.FAILED, JobState.CANCELLED]
        assert jobs.redrive(connection, batch, both) == 2
        assert reads.job(connection, JobRef(batch, 0)).failures == 0
        kinds = [event["kind"] for event in reads.history(connection, JobRef(batch, 0))]
    assert kinds == ["failed", "redriven"]
    assert kit.states(batch) == {"queued": 3}


def test_a_dead_session_gives_back_what_it_held(kit: Kit) -> None:
    batch = kit.batch(spec("started"), spec("waiting"), spec("done"))
    dead, alive = kit.session(ttl_s=-1.0), kit.session()
    claims = kit.claim(batch, dead, limit=3)
    with kit.db.write() as connection:
        jobs.mark_started(connection, claims[:1])
        jobs.succeed(connection, [(claims[2], PICTURE)])
    assert reconcile(kit.db, SETTINGS) == 2
    assert reconcile(kit.db, SETTINGS) == 0
    assert kit.states(batch) == {"queued": 2, "succeeded": 1}
    with kit.db.read() as connection:
        assert reads.job(connection, claims[0].ref).failures == 1
        assert reads.job(connection, claims[1].ref).failures == 0
        assert [worker.id for worker in sessions.live(connection)] == [alive]
    with kit.db.write() as connection:
        assert not sessions.beat(connection, dead, 30, sessions.Beat())
        assert sessions.beat(connection, alive, 30, sessions.Beat("rendering", "", 3, 0.5))
    (suspect,) = kit.claim(batch, alive, limit=3)
    assert suspect.suspect
    assert suspect.ref == claims[0].ref


def test_claims_of_an_ended_session_are_found(kit: Kit) -> None:
    batch, session = kit.batch(spec()), kit.session()
    kit.claim(batch, session)
    with kit.db.write() as connection:
        sessions.close(connection, session)
    assert reconcile(kit.db, SETTINGS) == 1
    assert kit.states(batch) == {"queued": 1}


def test_many_claimants_never_share_a_job(kit: Kit) -> None:
    batch = kit.batch(*(spec(f"p{i}") for i in range(300)))
    sessions_ = [kit.session() for _ in range(4)]
    start = threading.Barrier(4)

    def work(session: str) -> list[JobRef]:
        start.wait()
        done: list[JobRef] = []
        while True:
            with kit.db.write() as connection:
                rows = turns.candidates(connection, LANE)
                claims = [
                    claim
                    for row in rows
                    for claim in jobs.claim(connection, row.id, row.params, session, LANE, 7)
                ]
            if not claims:
                return done
            with kit.db.write() as connection:
                moved = jobs.succeed(connection, [(claim, PICTURE) for claim in claims])
            assert moved == {claim.ref for claim in claims}
            done += moved

    with ThreadPoolExecutor(4) as pool:
        done = [ref for refs in pool.map(work, sessions_) for ref in refs]
    assert len(done) == len(set(done)) == 300
    assert kit.states(batch) == {"succeeded": 300}


@pytest.mark.parametrize(
    "values",
    [
        {"state": "done"},
        {"state": "succeeded", "session_id": None, "finished_at": 1.0},
        {"state": "failed", "finished_at": 1.0},
        {"state": "cancelled"},
        {"state": "running"},
        {"session_id": "x"},
        {"finished_at": 1.0},
    ],
)
def test_the_database_holds_the_invariants(kit: Kit, values: dict[str, object]) -> None:
    kit.batch(spec())
    with pytest.raises(IntegrityError), kit.db.write() as connection:
        connection.execute(update(jobs_table).values(**values))


def test_counters_never_fall_below_zero(kit: Kit) -> None:
    batch = kit.batch(spec())
    with pytest.raises(IntegrityError), kit.db.write() as connection:
        connection.execute(text("UPDATE batch_counts SET queued = -1"))
    assert kit.states(batch) == {"queued": 1}


def test_two_models_that_end_at_once_finish_their_batch(kit: Kit) -> None:
    batch = kit.batch(spec("a"), spec("b", model="other"))
    other = Lane("other", "fake")
    (one,) = kit.claim(batch, kit.session())
    (two,) = kit.claim(batch, kit.session(lane=other), lane=other)
    start = threading.Barrier(2)

    def end(claim: jobs.Claim) -> None:
        start.wait()
        with kit.db.write() as connection:
            jobs.succeed(connection, [(claim, PICTURE)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(end, (one, two)))
    with kit.db.read() as connection:
        assert batches.status(connection, batch).finished_at is not None


def test_a_batch_with_nothing_due_does_not_hide_others(kit: Kit) -> None:
    for _ in range(20):
        (held,) = kit.claim(kit.batch(spec("later"), priority=1), kit.session())
        with kit.db.write() as connection:
            jobs.requeue(connection, held, RenderFailed("x"), count=True, delay_s=3600)
    batch = kit.batch(spec("now"))
    assert claim_bundle(kit.db, kit.session(), LANE, 4)[0].ref.batch_id == batch


def test_an_ended_session_claims_nothing(kit: Kit) -> None:
    kit.batch(spec())
    session = kit.session()
    assert len(claim_bundle(kit.db, session, LANE, 4)) == 1
    with kit.db.write() as connection:
        sessions.close(connection, session)
    kit.batch(spec())
    assert claim_bundle(kit.db, session, LANE, 4) == []


def test_a_session_that_beat_again_is_not_lost_nor_one_in_an_outage(kit: Kit) -> None:
    batch = kit.batch(spec())
    session = kit.session(ttl_s=-1.0)
    kit.claim(batch, session)
    assert reconcile(kit.db, SETTINGS, lenient=True) == 0
    with kit.db.write() as connection:
        assert sessions.expired(connection) == [session]
        sessions.beat(connection, session, 30, sessions.Beat())
        assert not sessions.close_lost(connection, session)
    assert reconcile(kit.db, SETTINGS) == 0


def test_a_batch_that_was_never_submitted_whole_is_removed(kit: Kit) -> None:
    batch, fresh = kit.batch(spec(), ready=False), kit.batch(spec(), ready=False)
    with kit.db.write() as connection:
        old = batches_table.c.id == batch
        connection.execute(update(batches_table).where(old).values(touched_at=1.0))
    remove_abandoned(kit.db)
    with kit.db.read() as connection:
        assert [b.id for b in batches.recent(connection)] == [fresh]
        assert jobs.count_states(connection, batch) == {}


def test_finding_batches(kit: Kit) -> None:
    batch = kit.batch(spec())
    with kit.db.read() as connection:
        assert batches.find(connection, batch) == batch
        assert batches.find(connection, batch[-6:]) == batch
        assert batches.find(connection, "latest") == batch
        for wrong in ("zzzzzzzz", "%", "_", "a/b", ""):
            with pytest.raises(NotFound):
                batches.find(connection, wrong)
        with pytest.raises(NotFound):
            batches.status(connection, "nope")
        with pytest.raises(NotFound):
            reads.job(connection, JobRef(batch, 5))


def test_every_arrow_of_the_table_is_walked_by_a_function(kit: Kit) -> None:
    """The arrows that the functions walk are those of TRANSITIONS, neither more nor fewer."""
    walked = set()
    real = jobs._Tally.move

    def spy(self, pool, old, new, n=1):  # type: ignore[no-untyped-def]
        walked.add((old, new))
        real(self, pool, old, new, n)

    jobs._Tally.move = spy  # type: ignore[method-assign]
    try:
        batch, session = kit.batch(*(spec(str(i)) for i in range(6))), kit.session()
        a, b, c, d = kit.claim(batch, session, limit=4)
        with kit.db.write() as connection:
            jobs.succeed(connection, [(a, PICTURE)])
            jobs.fail(connection, b, RenderFailed("x"))
            jobs.requeue(connection, c, RenderFailed("x"))
            jobs.cancel_running(connection, d)
            jobs.request_cancel(connection, batch, 4)
            jobs.redrive(connection, batch, [JobState.FAILED, JobState.CANCELLED])
    finally:
        jobs._Tally.move = real  # type: ignore[method-assign]
    assert walked == {(old, new) for old, news in TRANSITIONS.items() for new in news}


def test_a_database_without_a_schema_says_what_to_run(database_url: str) -> None:
    db = Database(database_url)
    with pytest.raises(InvalidConfig, match="farm db upgrade"), db.read() as connection:
        batches.recent(connection)
    db.close()


def test_a_database_that_is_away_is_said_so() -> None:
    db = Database("postgresql+psycopg://user:s3cret@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailable) as caught, db.read():
        pass
    assert "does not answer" in caught.value.message
    assert "s3cret" not in caught.value.message
