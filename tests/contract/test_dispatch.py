"""Who is served next: the same on SQLite and on PostgreSQL. No test here waits for a clock."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, text, update

from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.dispatcher import _Dispatcher
from farm.errors import NotFound, QuotaExceeded, RenderFailed
from farm.reconcile import end_stopped
from farm.spec import NewJob
from farm.states import JobState
from farm.store import batches, intake, jobs, leases, owners, reads, turns
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from farm.store.owners import Limits
from farm.store.tables import batches as batches_table
from farm.store.tables import leases as leases_table
from farm.store.tables import turns as turns_table
from farm.submitting import Plan, submit
from tests.store_kit import LANE, PICTURE, Kit, spec


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


def many(n: int) -> list[NewJob]:
    return [NewJob.of(spec(f"p{i}")) for i in range(n)]


def claim(kit: Kit, session: str, limit: int = 4) -> list[Claim]:
    return claim_bundle(kit.db, session, LANE, limit)


def finish(kit: Kit, claims: list[Claim]) -> None:
    with kit.db.write() as connection:
        assert len(jobs.succeed(connection, [(one, PICTURE) for one in claims])) == len(claims)


@dataclass
class Floor:
    """A simulated farm: so many workers, each claims anew when it has finished its bundle."""

    kit: Kit
    workers: int
    bundle: int
    owner_of: dict[str, str]
    held: deque[list[Claim]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.session = self.kit.session()

    def step(self) -> str:
        """The next bundle is claimed, after the oldest was finished; whose it is."""
        if len(self.held) >= self.workers:
            finish(self.kit, self.held.popleft())
        claims = claim(self.kit, self.session, self.bundle)
        if not claims:
            return "-"
        self.held.append(claims)
        return self.owner_of[claims[0].ref.batch_id]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_two_owners_are_served_in_proportion(kit: Kit, workers: int) -> None:
    big = kit.batch(*(spec(f"p{i}") for i in range(400)), owner="big")
    floor = Floor(kit, workers, 4, {big: "big"})
    assert {floor.step() for _ in range(workers + 2)} == {"big"}
    small = kit.batch(*(spec(f"p{i}") for i in range(40)), owner="small")
    floor.owner_of[small] = "small"
    served = [floor.step() for _ in range(20)]
    assert "small" in served[:2]  # at once
    assert served.count("small") == 10  # all of it, in about twice the time it takes alone
    assert served.count("big") == 10
    longest = max(len(run) for run in "".join(owner[0] for owner in served).split("s"))
    assert longest <= workers + 1, served
    assert [floor.step() for _ in range(5)] == ["big"] * 5


def test_owners_without_running_jobs_take_turns(kit: Kit) -> None:
    """A worker that claims only when it has recorded all: running jobs tell nothing."""
    owner_of = {kit.batch(*[spec()] * 40, owner=owner): owner for owner in ("a", "b", "c")}
    floor = Floor(kit, 1, 2, owner_of)
    served = [floor.step() for _ in range(12)]
    assert Counter(served) == {"a": 4, "b": 4, "c": 4}
    assert all(len(set(served[i : i + 3])) == 3 for i in range(0, 12, 3))


@pytest.mark.parametrize("rival", ["mine", "other"])
def test_no_stream_of_new_batches_starves_an_old_one(kit: Kit, rival: str) -> None:
    old = kit.batch(*[spec()] * 20, owner="mine")
    floor = Floor(kit, 1, 1, {old: "old"})
    for _ in range(3):
        floor.owner_of[kit.batch(spec(), owner=rival)] = "new"
    served = []
    for _ in range(8):
        for _ in range(2):  # they come faster than they are rendered
            floor.owner_of[kit.batch(spec(), owner=rival)] = "new"
        served.append(floor.step())
    assert served.count("old") >= (4 if rival == "other" else 2), served


def test_an_owners_batches_share_by_running_jobs(kit: Kit) -> None:
    first, second = kit.batch(*[spec()] * 40), kit.batch(*[spec()] * 40)
    floor = Floor(kit, 4, 2, {first: "1", second: "2"})
    assert Counter(floor.step() for _ in range(12)) == {"1": 6, "2": 6}


def test_an_urgent_job_is_the_next_bundle_and_pause_acts_at_once(kit: Kit) -> None:
    kit.batch(*[spec()] * 60)
    session = kit.session()
    claim(kit, session)
    urgent = kit.batch(spec(), priority=1)
    with kit.db.write() as connection:
        batches.set_paused(connection, urgent, True)
    assert claim(kit, session)[0].ref.batch_id != urgent
    with kit.db.write() as connection:
        batches.set_paused(connection, urgent, False)
    assert claim(kit, session)[0].ref.batch_id == urgent


def test_the_limit_of_running_jobs_is_kept_by_many_claimants(kit: Kit) -> None:
    kit.batch(*[spec()] * 60, owner="a", priority=1)
    kit.batch(*[spec()] * 4, owner="a")
    free = kit.batch(*[spec()] * 4, owner="b")
    with kit.db.write() as connection:
        owners.set_limits(connection, "*", Limits(max_running=7))
        owners.set_limits(connection, "b", Limits())
    start = threading.Barrier(4)

    def work(session: str) -> list[Claim]:
        start.wait()
        return [one for _ in range(4) for one in claim(kit, session, 3)]

    with ThreadPoolExecutor(4) as pool:
        found = [one for got in pool.map(work, [kit.session() for _ in range(4)]) for one in got]
    assert Counter(one.ref.batch_id == free for one in found) == {False: 7, True: 4}
    finish(kit, [one for one in found if one.ref.batch_id != free][:2])
    assert len(claim(kit, kit.session(), 9)) == 2
    with kit.db.read() as connection:
        told = {row.owner: row for row in owners.listing(connection)}
    assert (told["a"].running, told["a"].queued, told["a"].max_running) == (7, 55, 7)
    assert (told["b"].running, told["b"].max_running) == (4, None)


@pytest.mark.parametrize("eager", [False, True])
def test_the_limit_of_queued_jobs_is_told_at_submit(kit: Kit, eager: bool) -> None:
    with kit.db.write() as connection:
        owners.set_limits(connection, "a", Limits(max_queued=10))
    submit(kit.db, many(8), Plan(owner="a"))
    with pytest.raises(QuotaExceeded, match=r"'a' may have 10 jobs queued at once; 8 are"):
        submit(kit.db, many(3), Plan(owner="a", eager=eager))
    with kit.db.read() as connection:
        assert sum(batch.counts["queued"] for batch in batches.recent(connection)) == 8
    submit(kit.db, many(2), Plan(owner="a"))
    submit(kit.db, many(30), Plan(owner="b"))


def test_two_submits_at_once_do_not_pass_the_limit(kit: Kit) -> None:
    with kit.db.write() as connection:
        owners.set_limits(connection, "*", Limits(max_queued=50))
    start = threading.Barrier(4)

    def work(_: int) -> int:
        start.wait()
        try:
            return submit(kit.db, many(20), Plan(owner="a")).total
        except QuotaExceeded:
            return 0

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 40


def test_what_has_not_begun_when_the_batch_expires_is_cancelled(kit: Kit) -> None:
    batch = kit.batch(*[spec()] * 5, expires_s=3600.0)
    session = kit.session()
    held = claim(kit, session, 2)
    with kit.db.write() as connection:
        passed = update(batches_table).where(batches_table.c.id == batch)
        connection.execute(passed.values(expires_at=1.0))
    assert claim(kit, session) == []
    with kit.db.read() as connection:
        assert turns.backlog(connection) == {}
    assert end_stopped(kit.db) == 3
    assert end_stopped(kit.db) == 0
    assert kit.states(batch) == {"running": 2, "cancelled": 3}
    with kit.db.write() as connection:
        assert reads.job(connection, JobRef(batch, 4)).error_code == "ERR_EXPIRED"
        assert reads.history(connection, JobRef(batch, 4))[0]["code"] == "ERR_EXPIRED"
        assert jobs.requeue(connection, held[0], RenderFailed("x"))
    finish(kit, held[1:])
    assert end_stopped(kit.db) == 1
    with kit.db.write() as connection:
        assert batches.status(connection, batch).done
        assert jobs.redrive(connection, batch, [JobState.CANCELLED]) == 4
    assert len(claim(kit, session, 9)) == 4  # a person wants them in spite of the deadline


def test_a_batch_after_another_waits_until_that_is_done(kit: Kit) -> None:
    first = kit.batch(spec("a"), spec("b"))
    second = kit.batch(spec("c"), after=first, priority=9)
    third = kit.batch(spec("d"), after=second)
    session = kit.session()
    with kit.db.read() as connection:
        assert batches.status(connection, second).waits
        assert batches.status(connection, second).after == first
        assert turns.backlog(connection) == {("shapes", ""): 2}
    held = claim(kit, session, 9)
    assert {one.ref.batch_id for one in held} == {first}
    assert claim(kit, session) == []
    finish(kit, held[:1])
    assert claim(kit, session) == []
    with kit.db.write() as connection:
        assert jobs.fail(connection, held[1], RenderFailed("x"))  # however it ends
    (next_one,) = claim(kit, session)
    assert next_one.ref.batch_id == second
    with kit.db.write() as connection:
        assert not batches.status(connection, second).waits
        batches.remove(connection, second)  # what is removed is waited for no more
    assert claim(kit, session)[0].ref.batch_id == third
    with pytest.raises(NotFound, match="no batch 'nope' to come after"):
        kit.batch(spec(), after="nope")


def test_cancel_of_a_batch_stops_claims_before_its_first_step(kit: Kit) -> None:
    batch = kit.batch(*[spec()] * 30)
    session = kit.session()
    held = claim(kit, session)
    with kit.db.write() as connection:
        batches.set_cancelled(connection, batch)
    assert claim(kit, session) == []
    with kit.db.write() as connection:
        assert jobs.request_cancel(connection, batch, limit=10) == (10, 4)
    # the process that was at it dies here; the reconciler goes on
    assert end_stopped(kit.db) == 16
    with kit.db.write() as connection:
        assert jobs.cancel_running(connection, held[0])
        assert jobs.requeue(connection, held[1], RenderFailed("x"))
    finish(kit, held[2:])
    assert kit.states(batch) == {"cancelled": 28, "succeeded": 2}
    with kit.db.write() as connection:
        assert jobs.redrive(connection, batch, [JobState.CANCELLED], limit=20) == 20
    assert len(claim(kit, session, 30)) == 20


def test_one_dispatcher_leads_and_a_dead_one_is_replaced(kit: Kit) -> None:
    stop = threading.Event()
    one, two = (_Dispatcher(kit.db, None, Settings(), stop) for _ in range(2))  # type: ignore[arg-type]
    for _ in range(2):
        one._lead()
        two._lead()
        assert (one.leads, two.leads) == (True, False)
    with kit.db.write() as connection:  # its lease runs out
        connection.execute(update(leases_table).values(expires_at=1.0))
    two._lead()
    one._lead()
    assert (one.leads, two.leads) == (False, True)
    two._hand_over()
    one._lead()
    assert one.leads


def test_many_who_want_the_first_lease_get_one(kit: Kit) -> None:
    start = threading.Barrier(6)

    def take(name: int) -> bool:
        start.wait()
        with kit.db.write() as connection:
            return leases.take(connection, leases.DISPATCHER, str(name), 60.0)

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(take, range(6))) == 1


def test_an_eager_batch_grows_while_it_is_rendered(kit: Kit) -> None:
    """Both sides take their locks in one order, so that neither waits for the other for ever."""
    batch = kit.batch(spec("first"), ready=False)
    with kit.db.write() as connection:
        mine = update(batches_table).where(batches_table.c.id == batch)
        connection.execute(mine.values(ready=True, total=1))
    grown, session = 60, kit.session()

    def grow() -> None:
        for total in range(1, grown):
            with kit.db.write() as connection:
                assert batches.grow(connection, batch, total, total + 1, "")
                intake.insert(connection, batch, total, many(1), {})

    with ThreadPoolExecutor(2) as pool:
        growing = pool.submit(grow)
        done = 0
        while done < grown:
            claims = claim(kit, session)
            finish(kit, claims)
            done += len(claims)
            if not claims and growing.done():
                growing.result()
    with kit.db.write() as connection:
        assert not batches.status(connection, batch).done
        batches.release(connection, batch, grown)
        jobs.close_if_finished(connection, batch)
        assert batches.status(connection, batch).finished_at is not None


def test_a_claim_looks_at_no_history(pg_url: str) -> None:
    """PostgreSQL's own word: only indexes are walked, however much has ended."""
    kit = Kit.at(pg_url)
    batch = kit.batch(*[spec()] * 300)
    with kit.db.write() as connection:
        connection.execute(
            text(
                "INSERT INTO batches (id,params,created_at,touched_at,ready,whole,finished_at) "
                "SELECT 'h' || i, '{}', 1, 1, true, true, 1 FROM generate_series(1, 20000) i"
            )
        )
        connection.execute(
            text(
                "INSERT INTO batch_counts (batch_id, model, succeeded) "
                "SELECT 'h' || i, 'shapes', 1 FROM generate_series(1, 20000) i"
            )
        )
        connection.execute(
            text(
                "INSERT INTO jobs (batch_id, idx, model, key, prompt, seed) "
                f"SELECT '{batch}', i, 'shapes', 'k', 'p', 1 FROM generate_series(300, 30000) i"
            )
        )
        connection.execute(text("ANALYZE"))
    session, seen = kit.session(), []

    def look(connection, cursor, statement, parameters, context, many) -> None:  # type: ignore[no-untyped-def]
        seen.append((statement, parameters))

    event.listen(kit.db.engine, "before_cursor_execute", look)
    assert claim(kit, session)
    event.remove(kit.db.engine, "before_cursor_execute", look)
    plans = []
    for statement, parameters in seen:
        with kit.db.read() as connection:
            rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
            plans.append("\n".join(row[0] for row in rows))
    for plan in plans:
        for table in ("jobs", "batches", "batch_counts"):
            assert f"Seq Scan on {table}" not in plan, plan
    heads = [
        p for (s, _), p in zip(seen, plans, strict=True) if "jobs.suspect" in s and "SKIP" in s
    ]
    assert "using ix_jobs_queued" in heads[0], heads  # not the key, which has the ended ones too
    kit.db.close()


BATCH = st.tuples(st.sampled_from("abc"), st.integers(0, 1), st.integers(1, 6))
ACTS = st.lists(st.one_of(BATCH, st.integers(1, 3), st.none()), min_size=3, max_size=25)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(acts=ACTS)
def test_every_claim_obeys_the_policy(
    kit: Kit, acts: list[tuple[str, int, int] | int | None]
) -> None:
    """Batches come, bundles are claimed (a number: at most so many) and finished (None)."""
    with kit.db.write() as connection:
        for table in (batches_table, turns_table):
            connection.execute(delete(table))
        owners.set_limits(connection, "c", Limits(max_running=2))
    session, held = kit.session(), deque[list[Claim]]()
    world: dict[str, tuple[str, int]] = {}
    queued, running = Counter[str](), Counter[str]()
    for act in acts:
        if act is None:
            if held:
                done = held.popleft()
                finish(kit, done)
                running[done[0].ref.batch_id] -= len(done)
        elif isinstance(act, int):
            bundle = claim(kit, session, act)
            _check(world, queued, running, act, bundle)
            if bundle:
                held.append(bundle)
                queued[bundle[0].ref.batch_id] -= len(bundle)
                running[bundle[0].ref.batch_id] += len(bundle)
        else:
            owner, priority, n = act
            batch = kit.batch(*[spec()] * n, owner=owner, priority=priority)
            world[batch], queued[batch] = (owner, priority), n


def _check(
    world: dict[str, tuple[str, int]],
    queued: Counter[str],
    running: Counter[str],
    limit: int,
    bundle: list[Claim],
) -> None:
    load = Counter[str]()
    for batch, n in running.items():
        load[world[batch][0]] += n
    room = {owner: 2 - load[owner] if owner == "c" else limit for owner in "abc"}
    may = {b: owner for b, (owner, _) in world.items() if queued[b] and room[owner] > 0}
    if not may:
        assert bundle == []
        return
    (got,) = {one.ref.batch_id for one in bundle}
    owner, priority = world[got]
    assert got in may
    assert priority == max(world[b][1] for b in may)
    rivals = [b for b in may if world[b][1] == priority]
    assert load[owner] == min(load[world[b][0]] for b in rivals)
    assert running[got] == min(running[b] for b in rivals if world[b][0] == owner)
    assert len(bundle) == min(limit, queued[got], room[owner])
