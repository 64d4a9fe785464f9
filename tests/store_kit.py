"""Short ways to put a store into a state, for tests that begin there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from farm.catalog import Lane
from farm.spec import JobSpec, NewJob
from farm.store import batches, counters, intake, jobs, schema, sessions
from farm.store.db import Database
from farm.store.jobs import Claim, Picture
from farm.store.tables import batches as batches_table

LANE = Lane("shapes", "fake")
PICTURE = Picture("pictures/x.png", "0" * 64, 10, 0.5, "f" * 64)


def spec(prompt: str = "a red circle", **fields: object) -> JobSpec:
    whole = {
        "model": "shapes", "prompt": prompt, "width": 64, "height": 64, "steps": 4,
        "guidance_scale": 4.0, "seed": 1, **fields,
    }  # fmt: skip
    return JobSpec.model_validate(whole)


@dataclass
class Kit:
    """A migrated database and what tests do with it."""

    db: Database

    @classmethod
    def at(cls, url: str) -> Kit:
        db = Database(url)
        schema.upgrade(db)
        return cls(db)

    def batch(
        self, *specs: JobSpec, priority: int = 0, ready: bool = True, owner: str = "", **about: Any
    ) -> str:
        shared = {
            k: v
            for k, v in specs[0].model_dump(mode="json").items()
            if k not in ("prompt", "seed", "engine")
        }
        with self.db.write() as connection:
            who: dict[str, Any] = {"name": "", "owner": owner, "priority": priority, **about}
            batch_id = batches.create(connection, shared, **who)
            intake.insert(connection, batch_id, 0, [NewJob.of(s) for s in specs], shared)
            if ready:
                batches.release(connection, batch_id, len(specs))
        return batch_id

    def session(
        self, ttl_s: float = 30.0, lane: Lane = LANE, *, memory: int | None = None, **info: object
    ) -> str:
        with self.db.write() as connection:
            return sessions.open_session(
                connection, lane, ttl_s, host="h", pid=1, device="cpu", memory=memory, info=info
            )

    def claim(
        self, batch_id: str, session_id: str, limit: int = 1, lane: Lane = LANE, asked: str = ""
    ) -> list[Claim]:
        with self.db.write() as connection:
            mine = select(batches_table.c.params).where(batches_table.c.id == batch_id)
            params = connection.scalars(mine).one()
            return jobs.claim(connection, batch_id, params, session_id, lane, limit, asked)

    def states(self, batch_id: str) -> dict[str, int]:
        """The counters, checked against a full count."""
        with self.db.read() as connection:
            assert counters.drift(connection, batch_id) == []  # one statement sees one moment
            return jobs.count_states(connection, batch_id)
