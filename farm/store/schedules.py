"""Schedules and their runs in SQL. What is due and what may start is decided in farm.schedules.

Times come in as `at`, seconds since 1970: the database's clock (`clock`), or a simulated one. Every
move of a run is guarded by its state and, where it runs, by its holder.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from farm.errors import Invalid, NotFound
from farm.store.tables import schedule_runs, schedules


@dataclass(frozen=True)
class Terms:
    """What a person says of a schedule.

    `recipe`: an absolute path. `until`: local time at which a run's window closes, such as 07:00.
    `catch_up`: a due time that no dispatcher saw is made up for, once.
    """

    name: str
    recipe: str
    cron: str
    tz: str
    until: str | None = None
    priority: int | None = None
    catch_up: bool = False
    owner: str = ""


@dataclass(frozen=True)
class Schedule:
    """A schedule as it stands. Times in seconds since 1970."""

    id: str
    name: str
    recipe: str
    cron: str
    tz: str
    until: str | None
    priority: int | None
    catch_up: bool
    paused: bool
    owner: str
    created_at: float
    last_due: float | None
    next_due: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One due time of a schedule, or a run that a person asked for (`kind` manual).

    `state`: pending, running, waiting (begun, and its window is closed), succeeded, failed or
    skipped. `why`: it stands so, for a person.
    """

    schedule_id: str
    due_at: float
    kind: str
    state: str
    why: str
    holder: str | None
    lease_until: float | None
    batch_id: str | None
    started_at: float | None
    finished_at: float | None
    summary: dict[str, Any] | None

    @property
    def begun(self) -> bool:
        """Under way: it was started once and is not over."""
        return self.started_at is not None and self.finished_at is None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- schedules


def _schedule(row: Row[Any]) -> Schedule:
    return Schedule(**row._mapping)


def add(connection: Connection, terms: Terms, next_due: float, at: float) -> Schedule:
    """A new schedule. Raises Invalid when its name is taken."""
    values = asdict(terms) | {"id": secrets.token_hex(6), "next_due": next_due, "created_at": at}
    try:
        made = connection.execute(schedules.insert().values(values).returning(schedules))
    except IntegrityError:
        raise Invalid(
            f"there is a schedule {terms.name!r} already; choose another --name, or remove it: "
            f"farm schedule remove {terms.name}"
        ) from None
    return _schedule(made.one())


def find(connection: Connection, name: str) -> Schedule:
    """Raises NotFound."""
    row = connection.execute(select(schedules).where(schedules.c.name == name)).first()
    if row is None:
        raise NotFound(f"no schedule {name[:63]!r}; `farm schedule list` shows them")
    return _schedule(row)


def listing(connection: Connection) -> list[Schedule]:
    """All schedules by name."""
    return [_schedule(row) for row in connection.execute(select(schedules).order_by("name"))]


def lock(connection: Connection, schedule_id: str) -> Schedule | None:
    """The schedule, which nobody else changes before this transaction ends; None: it is gone."""
    mine = select(schedules).where(schedules.c.id == schedule_id).with_for_update()
    row = connection.execute(mine).first()
    return _schedule(row) if row else None


def remove(connection: Connection, schedule_id: str) -> None:
    """The schedule and its history are gone; a run under way is stopped by its dispatcher."""
    connection.execute(delete(schedules).where(schedules.c.id == schedule_id))


def set_paused(connection: Connection, schedule_id: str, paused: bool, next_due: float) -> None:
    """Pause, or go on with `next_due` as the next due time."""
    mine = update(schedules).where(schedules.c.id == schedule_id)
    connection.execute(mine.values(paused=paused, next_due=next_due))


def due(connection: Connection, at: float) -> list[Schedule]:
    """The schedules that have a due time by now which was not recorded yet."""
    query = select(schedules).where(~schedules.c.paused, schedules.c.next_due <= at)
    return [_schedule(row) for row in connection.execute(query)]


def advance(connection: Connection, was: Schedule, last_due: float | None, next_due: float) -> bool:
    """Move a schedule on; False: another dispatcher did, or it was paused or removed."""
    mine = and_(schedules.c.id == was.id, schedules.c.next_due == was.next_due, ~schedules.c.paused)
    moved = update(schedules).where(mine).values(last_due=last_due, next_due=next_due)
    return bool(connection.execute(moved).rowcount)


# ---- runs


def _run(row: Row[Any]) -> Run:
    return Run(**row._mapping)


def _is(run: Run) -> Any:
    return and_(
        schedule_runs.c.schedule_id == run.schedule_id, schedule_runs.c.due_at == run.due_at
    )


def record(connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put runs in; a due time that has its row keeps it."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(schedule_runs).on_conflict_do_nothing()
    connection.execute(insert, [dict(row) for row in rows])


def skip_pending(connection: Connection, schedule_id: str, why: str, at: float) -> None:
    """Due times that have not begun are not run any more."""
    mine = and_(
        schedule_runs.c.schedule_id == schedule_id,
        schedule_runs.c.kind == "due",
        schedule_runs.c.state == "pending",
        schedule_runs.c.started_at.is_(None),
    )
    skipped = update(schedule_runs).where(mine)
    connection.execute(skipped.values(state="skipped", why=why, finished_at=at))


def open_runs(connection: Connection, schedule_id: str | None = None) -> list[Run]:
    """The runs that are not over, of one schedule or of all, oldest first."""
    query = select(schedule_runs).where(schedule_runs.c.finished_at.is_(None))
    if schedule_id is not None:
        query = query.where(schedule_runs.c.schedule_id == schedule_id)
    return [_run(row) for row in connection.execute(query.order_by(schedule_runs.c.due_at))]


def history(connection: Connection, schedule_id: str, limit: int) -> list[Run]:
    """The newest runs of a schedule, newest first."""
    query = select(schedule_runs).where(schedule_runs.c.schedule_id == schedule_id)
    newest = query.order_by(schedule_runs.c.due_at.desc()).limit(limit)
    return [_run(row) for row in connection.execute(newest)]


def as_manual(connection: Connection, run: Run) -> None:
    """A person wants the run to go on at once: no window binds it any more."""
    connection.execute(update(schedule_runs).where(_is(run)).values(kind="manual"))


def take(connection: Connection, run: Run, holder: str, at: float, ttl_s: float) -> bool:
    """Hold the run for `ttl_s` seconds; False: it is not as it was, or another one holds it."""
    free = or_(schedule_runs.c.lease_until.is_(None), schedule_runs.c.lease_until < at)
    mine = and_(_is(run), schedule_runs.c.state == run.state, free)
    values = {"state": "running", "holder": holder, "lease_until": at + ttl_s}
    first = {"why": ""} if run.begun else {"started_at": at}
    taken = update(schedule_runs).where(mine).values(**values, **first)
    return bool(connection.execute(taken).rowcount)


def renew(
    connection: Connection, run: Run, holder: str, at: float, ttl_s: float, batch_id: str | None
) -> bool:
    """Hold it on, and note its batch; False: it is another's now, or gone."""
    mine = and_(_is(run), schedule_runs.c.holder == holder)
    values = {"lease_until": at + ttl_s} | ({"batch_id": batch_id} if batch_id else {})
    return bool(connection.execute(update(schedule_runs).where(mine).values(values)).rowcount)


def release(
    connection: Connection,
    run: Run,
    holder: str | None,
    state: str,
    at: float,
    why: str = "",
    summary: Mapping[str, Any] | None = None,
) -> bool:
    """Hold it no more: it is over, waits for its window, or may be carried on by anyone (pending).

    `holder` None: nobody has it. `why` empty: as it was. False: it is another's now, or gone.
    """
    mine = and_(_is(run), schedule_runs.c.holder.is_not_distinct_from(holder))
    over = state in ("succeeded", "failed")
    values = {
        "state": state, "why": why or schedule_runs.c.why, "holder": None, "lease_until": None,
        "finished_at": at if over else None, "summary": dict(summary) if summary else None,
        "batch_id": run.batch_id,
    }  # fmt: skip
    return bool(connection.execute(update(schedule_runs).where(mine).values(values)).rowcount)
