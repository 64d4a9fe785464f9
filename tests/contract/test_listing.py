"""Pages of a large batch's jobs: right, in order, and at the cost of the page alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Select, String, cast, text, update
from sqlalchemy.dialects import postgresql, sqlite

from farm.store import batches, intake, jobs, prune, reads, reuse
from farm.store.tables import counts
from farm.store.tables import jobs as jobs_table
from tests.store_kit import Kit, spec

ROWS, PAGE = 20_000, 10
NONE: tuple[str, ...] = ()
FINAL = {"succeeded", "failed", "cancelled"}


def _state(idx: int) -> str:
    """A few in every other state, among queued and succeeded jobs."""
    if idx % 2_000 == 7:
        return "failed"
    if idx % 5_000 == 11:
        return "cancelled"
    if idx % 1_000 == 13:
        return "running"
    return "succeeded" if idx < ROWS // 2 else "queued"


def _code(idx: int) -> str | None:
    if _state(idx) == "failed":
        return "ERR_OUT_OF_MEMORY" if idx % 4_000 == 7 else "ERR_BAD_IMAGE"
    return "ERR_CANCELLED" if _state(idx) == "cancelled" else None


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


@pytest.fixture
def batch_id(kit: Kit) -> str:
    """A batch with jobs in all states, put there at once; the last ones ended an hour ago."""
    session_id = kit.session()
    made = kit.batch(spec("first"))
    shape = intake.NewJob.of(spec())
    with kit.db.write() as connection:
        intake.insert(connection, made, 1, [shape] * (ROWS - 1), {})
        for state in ("succeeded", "failed", "cancelled", "running"):
            for code in {_code(idx) for idx in range(ROWS) if _state(idx) == state}:
                mine = [i for i in range(ROWS) if (_state(i), _code(i)) == (state, code)]
                _put(connection, made, mine, state, code, session_id)
        tally = {state: sum(_state(i) == state for i in range(ROWS)) for state in jobs.JobState}
        connection.execute(update(counts).where(counts.c.batch_id == made).values(tally))
        connection.execute(text("ANALYZE"))
    return made


def _put(connection: Any, made: str, idxs: list[int], *how: Any) -> None:
    state, code, session_id = how
    ended = state in FINAL
    values = {
        "state": state,
        "error_code": code,
        "finished_at": batches.now() - 3600 if ended else None,
        "session_id": None if ended else session_id,
        "claim_no": 2,
        "failures": 1,
        "engine": "fake",
        "started_at": batches.now() - 3700,
        "object_key": "pictures/x.png" if state == "succeeded" else None,
        "size_bytes": 10,
        "sha256": "0" * 64,
        "fingerprint": cast(jobs_table.c.idx, String),
    }
    for start in range(0, len(idxs), 5_000):
        here = jobs_table.c.idx.in_(idxs[start : start + 5_000])
        mine = jobs_table.c.batch_id == made
        connection.execute(update(jobs_table).where(mine, here).values(values))


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (NONE, None),
        *[((state,), None) for state in jobs.JobState],
        (("failed", "cancelled"), None),
        (("queued", "failed", "running"), None),
        (("failed",), "ERR_OUT_OF_MEMORY"),
        (NONE, "ERR_CANCELLED"),
        (NONE, "ERR_UNHEARD_OF"),
    ],
)
def test_pages(kit: Kit, batch_id: str, states: tuple[str, ...], code: str | None) -> None:
    """All pages together are what a look at every row finds; no page walks the batch."""
    right = [
        i
        for i in range(ROWS)
        if (not states or _state(i) in states) and (code is None or _code(i) == code)
    ]
    found: list[int] = []
    limit = 3_000 if len(right) > 1_000 else PAGE
    with kit.db.read() as connection:
        page = [-1] * limit
        while len(page) == limit:
            more = reads.page(
                connection, batch_id, states=states, code=code, after=page[-1], limit=limit
            )
            page = [job.idx for job in more]
            found += page
        assert found == right
        for after in (-1, ROWS // 4):
            for query in reads._sources(connection, batch_id, states, code, after, PAGE):
                if code:
                    query = query.where(jobs_table.c.error_code == code)
                assert _walked(connection, query) <= 15 * PAGE


def _walked(connection: Any, query: Select[Any]) -> int:
    """Rows that the database looked at; on SQLite, where nobody counts, all of a scan."""
    literal = {"literal_binds": True}
    if connection.dialect.name == "postgresql":
        sql = query.compile(dialect=postgresql.dialect(), compile_kwargs=literal)
        plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}").scalar()
        return _rows(plan[0]["Plan"])
    sql = query.compile(dialect=sqlite.dialect(), compile_kwargs=literal)
    return _steps(connection, lambda: connection.exec_driver_sql(str(sql)).all())


def _steps(connection: Any, do: Callable[[], Any]) -> int:
    """How many hundreds of instructions SQLite carries out for it; 100 rows passed over take 10."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    driver = connection.connection.driver_connection
    driver.set_progress_handler(count, 100)
    do()
    driver.set_progress_handler(None, 0)
    return steps


def _rows(plan: dict[str, Any]) -> int:
    passed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
    mine = (plan["Actual Rows"] + passed) * plan["Actual Loops"]
    return int(mine) + sum(map(_rows, plan.get("Plans", ())))


def test_those_that_ended_of_late(kit: Kit, batch_id: str) -> None:
    failed = [i for i in range(ROWS) if _state(i) == "failed"]
    with kit.db.write() as connection:
        mine = (jobs_table.c.batch_id == batch_id, jobs_table.c.idx == failed[3])
        connection.execute(update(jobs_table).where(*mine).values(finished_at=batches.now()))
    with kit.db.read() as connection:
        page = reads.page(connection, batch_id, states=["failed"], within_s=60)
        assert [job.idx for job in page] == [failed[3]]
        page = reads.page(connection, batch_id, states=["failed"], within_s=7200)
        assert [job.idx for job in page] == failed


def test_fingerprints_and_keys_are_looked_up_in_their_indexes(kit: Kit, batch_id: str) -> None:
    """Neither reuse nor pruning reads the table, however many rows it has."""
    keys = [f"pictures/{batch_id}/{idx:07d}-1.png" for idx in range(50)]
    marks = [str(idx) for idx in range(0, 60, 2)]

    def look() -> None:
        found = reuse.rendered(connection, batch_id, marks)
        assert {mark: ref.idx for mark, ref in found.items()} == {
            mark: int(mark) for mark in marks if _state(int(mark)) == "succeeded"
        }
        assert prune.named_pictures(connection, keys) == set()

    with kit.db.read() as connection:
        if connection.dialect.name == "postgresql":
            scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'jobs'"
            before = connection.exec_driver_sql(scans).scalar()
            look()
            assert connection.exec_driver_sql(scans).scalar() == before
        else:
            assert _steps(connection, look) < 500


def test_a_linked_job_tells_whose_picture_it_has() -> None:
    """Told by the key of the object alone."""
    plain: dict[str, Any] = dict.fromkeys(reads.Job.__dataclass_fields__)
    of = {"batch_id": "0" * 16, "idx": 3, "object_key": f"pictures/{'0' * 16}/0000003-1.png"}
    own = reads.Job(**{**plain, **of})
    assert own.rendered_for is None
    linked = reads.Job(**{**plain, **of, "idx": 4})
    assert str(linked.rendered_for) == f"{'0' * 16}/3"
    assert reads.Job(**{**plain, **of, "object_key": None}).rendered_for is None
    assert json.dumps(linked.as_dict())
