"""What a submit would queue, and what it would cost; nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from farm.errors import RowError
from farm.spec import NewJob
from farm.store import sessions
from farm.store.db import Database
from farm.store.tables import jobs
from farm.store.tables import sessions as sessions_table

SAMPLES = 5
MOST_ERRORS = 1_000
LATEST = 200  # pictures of which the mean size is taken


@dataclass(frozen=True)
class Preview:
    """`seconds`: with the workers that live now; `size_bytes`: of all pictures. None: unknown.

    `unknown`: models of which no speed has been measured here yet. `samples`: the first jobs.
    """

    total: int
    by_model: dict[str, int]
    samples: list[dict[str, Any]]
    bad: int
    errors: list[RowError]
    seconds: float | None
    size_bytes: int | None
    unknown: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def preview(db: Database, stream: Iterable[NewJob | RowError]) -> Preview:
    """Read the whole stream, in bounded memory."""
    by_model: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    errors: list[RowError] = []
    bad = 0
    for item in stream:
        if isinstance(item, NewJob):
            by_model[item.shape.spec.model] += 1
            if len(samples) < SAMPLES:
                samples.append(item.spec.model_dump(mode="json", exclude_none=True))
            continue
        bad += 1
        if len(errors) < MOST_ERRORS:
            errors.append(item)
    with db.read() as connection:
        costs = {model: _cost(connection, model) for model in by_model}
    unknown = sorted(model for model, (seconds, _) in costs.items() if seconds is None)
    seconds = [n * (costs[model][0] or 0) for model, n in by_model.items()]
    sizes = [costs[model][1] for model in by_model]
    return Preview(
        total=by_model.total(),
        by_model=dict(by_model),
        samples=samples,
        bad=bad,
        errors=errors,
        seconds=None if unknown else sum(seconds),
        size_bytes=None
        if None in sizes
        else round(sum(n * (costs[m][1] or 0) for m, n in by_model.items())),
        unknown=unknown,
    )


def _cost(connection: Connection, model: str) -> tuple[float | None, float | None]:
    """(seconds a picture of all who serve the model, mean bytes of its latest pictures)."""
    speeds = [
        1 / worker.seconds_per_picture
        for worker in sessions.live(connection)
        if worker.model == model and worker.seconds_per_picture
    ]
    seconds = 1 / sum(speeds) if speeds else _last_speed(connection, model)
    latest = (
        select(jobs.c.size_bytes)
        .where(jobs.c.model == model, jobs.c.size_bytes.is_not(None))
        .order_by(jobs.c.batch_id.desc(), jobs.c.idx.desc())
        .limit(LATEST)
        .subquery()
    )
    size = connection.scalar(select(func.avg(latest.c.size_bytes)))
    return seconds, None if size is None else float(size)


def _last_speed(connection: Connection, model: str) -> float | None:
    """Of the last worker that rendered it, should none do now."""
    known = select(sessions_table.c.seconds_per_picture).where(
        sessions_table.c.model == model, sessions_table.c.seconds_per_picture.is_not(None)
    )
    found = connection.scalar(known.order_by(sessions_table.c.opened_at.desc()).limit(1))
    return None if found is None else float(found)
