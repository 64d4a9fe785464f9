"""How PostgreSQL finds the jobs of a group: by their places, even if it knows nothing of a table.

A large submit is at once in hand, and statistics come a minute later. Taking a batch, or what runs,
for a few rows, it would read all of it for each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from farm.dispatch import claim_bundle
from farm.store import jobs
from tests.store_kit import LANE, PICTURE, Kit, spec

GROUP = 256
ROWS = 60_000  # a table of less may be read whole: that takes as long as 256 look-ups


@pytest.fixture
def kit(pg_url: str) -> Iterator[Kit]:
    kit = Kit.at(pg_url)
    yield kit
    kit.db.close()


@pytest.mark.parametrize("known", [False, True])
def test_jobs_of_a_group_are_looked_up_by_their_places(kit: Kit, known: bool) -> None:
    batch = kit.batch(spec())
    with kit.db.write() as connection:
        connection.execute(text("ALTER TABLE jobs SET (autovacuum_enabled = off)"))
        _add(connection, batch, ROWS)
        if known:
            connection.execute(text("ANALYZE jobs"))
    session = kit.session()
    for _ in range(4):
        held = claim_bundle(kit.db, session, LANE, GROUP)
    assert len(held) == GROUP
    seen: list[tuple[str, Any]] = []

    def look(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        seen.append((statement, parameters))

    event.listen(kit.db.engine, "before_cursor_execute", look)
    with kit.db.write() as connection:
        jobs.lock(connection, held)
        jobs.mark_started(connection, held)
        jobs.record_progress(connection, [(claim, 0.5) for claim in held])
        assert len(jobs.succeed(connection, [(claim, PICTURE) for claim in held])) == GROUP
    assert len(claim_bundle(kit.db, session, LANE, GROUP)) == GROUP
    event.remove(kit.db.engine, "before_cursor_execute", look)
    groups = [one for one in seen if "unnest" in one[0]]
    assert len(groups) == 5, [statement for statement, _ in groups]
    with kit.db.read() as connection:
        for statement, parameters in groups:
            plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
            _assert_by_place(plan)


def _add(connection: Connection, batch: str, rows: int) -> None:
    connection.execute(
        text(
            "INSERT INTO jobs (batch_id, idx, model, key, prompt, seed)"
            " SELECT batch_id, i, model, key, prompt, 1"
            f" FROM jobs, generate_series(1, {rows - 1}) i WHERE batch_id = '{batch}'"
        )
    )
    connection.execute(text(f"UPDATE batch_counts SET queued = {rows}"))


def _assert_by_place(plan: list[str]) -> None:
    shown = "\n".join(plan)
    (at,) = [i for i, line in enumerate(plan) if " on jobs" in line and "Scan" in line]
    assert "Nested Loop" in shown, shown
    assert "Index Cond" in plan[at + 1], shown
    assert "idx = " in plan[at + 1], shown
