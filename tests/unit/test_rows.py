"""Rows given from Python: how a database goes through them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select, update

from farm.store.rows import rows
from farm.store.tables import jobs
from tests.store_kit import Kit, spec


def test_each_row_is_looked_up_by_its_place(tmp_path: Path) -> None:
    """SQLite's planner would rather go through the whole batch for each row given."""
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    batch = kit.batch(*(spec(str(i)) for i in range(3)))
    with kit.db.write() as connection:
        given = rows(connection, [jobs.c.idx, jobs.c.prompt], [(0, "x"), (2, 'a "b" \n\u00e9')])
        mine = (jobs.c.batch_id == batch, jobs.c.idx == given.c.idx)
        changed = update(jobs).where(*mine).values(prompt=given.c.prompt)
        text = str(changed.compile(connection, compile_kwargs={"literal_binds": True}))
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}").all()
        assert any("(batch_id=? AND idx=?)" in row[3] for row in plan), plan
        assert connection.execute(changed).rowcount == 2
        found = connection.scalars(select(jobs.c.prompt).order_by(jobs.c.idx)).all()
    assert found == ["x", "1", 'a "b" \n\u00e9']
    kit.db.close()
