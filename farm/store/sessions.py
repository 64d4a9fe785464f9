"""Sessions: one life of a worker, a heartbeat row with an expiry on the database's clock."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, func, select, update

from farm.catalog import Lane
from farm.states import JobState
from farm.store.ids import JobRef
from farm.store.tables import is_state, jobs, may_fit, not_avoided, now, sessions

AWAY_S = 300.0  # a worker that restarts is waited for
AT_WORK = ("idle", "rendering")  # states of a session that takes jobs now
_RUNNING = is_state(JobState.RUNNING)
IS_LIVE = and_(sessions.c.closed_at.is_(None), sessions.c.expires_at >= now())
CAN_WORK = and_(IS_LIVE, sessions.c.state != "resting")


@dataclass(frozen=True)
class Worker:
    """A worker as its session row shows it. Times in seconds, memory in bytes."""

    id: str
    model: str
    engine: str
    device: str
    memory: int | None
    host: str
    pid: int
    state: str
    note: str
    info: dict[str, Any]
    rendered: int
    stored_bytes: int
    spooled: int
    seconds_per_picture: float | None
    opened_at: float
    silent_s: float

    @property
    def lane(self) -> Lane:
        return Lane(self.model, self.engine)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Beat:
    """What a worker tells with each heartbeat."""

    state: str = "idle"
    note: str = ""
    rendered: int = 0
    seconds_per_picture: float | None = None
    stored_bytes: int = 0
    spooled: int = 0  # finished pictures that wait for the blob store


def open_session(
    connection: Connection,
    lane: Lane,
    ttl_s: float,
    *,
    host: str,
    pid: int,
    device: str,
    info: dict[str, Any],
    memory: int | None = None,
) -> str:
    """A new session that expires in `ttl_s` seconds unless it beats. Its id.

    `memory`: bytes that its engine may use.
    """
    session_id = secrets.token_hex(16)
    connection.execute(
        sessions.insert().values(
            id=session_id,
            model=lane.model,
            engine=lane.engine,
            device=device,
            memory=memory,
            host=host,
            pid=pid,
            info=info,
            opened_at=now(),
            heartbeat_at=now(),
            expires_at=now() + ttl_s,
        )
    )
    return session_id


def beat(
    connection: Connection,
    session_id: str,
    ttl_s: float,
    told: Beat,
    info: dict[str, Any] | None = None,
) -> bool:
    """Extend the lease by `ttl_s` from now. False: the session was lost, its jobs are others'.

    `info`: replaces what the session was opened with.
    """
    news = {} if info is None else {"info": info}
    moved = connection.execute(
        update(sessions)
        .where(sessions.c.id == session_id, sessions.c.closed_at.is_(None))
        .values(heartbeat_at=now(), expires_at=now() + ttl_s, **asdict(told), **news)
    )
    return bool(moved.rowcount)


def cancels(connection: Connection, session_id: str) -> set[JobRef]:
    """Jobs the session holds that a person wants cancelled."""
    rows = connection.execute(
        select(jobs.c.batch_id, jobs.c.idx).where(
            jobs.c.session_id == session_id, _RUNNING, jobs.c.cancel_requested
        )
    )
    return {JobRef(*row) for row in rows}


def close(connection: Connection, session_id: str) -> None:
    """End a session in good order."""
    connection.execute(
        update(sessions)
        .where(sessions.c.id == session_id, sessions.c.closed_at.is_(None))
        .values(closed_at=now())
    )


def close_lost(connection: Connection, session_id: str) -> bool:
    """End a session that is still expired now; False if it has beaten meanwhile, or had ended."""
    moved = connection.execute(
        update(sessions)
        .where(sessions.c.id == session_id, sessions.c.closed_at.is_(None))
        .where(sessions.c.expires_at < now())
        .values(closed_at=now(), lost=True)
    )
    return bool(moved.rowcount)


@dataclass(frozen=True)
class Claimant:
    """A session that claims. `memory`: bytes that its engine may use; None: nobody knows.

    `others`: who else takes jobs of its model now: by engine asked for ('': none), the most memory
    in bytes (0: unknown) that such a worker has.
    """

    session_id: str
    memory: int | None
    others: dict[str, int]

    def may_take(self) -> ColumnElement[bool]:
        """Jobs that are not too large for it, and not left to others."""
        return and_(may_fit(self.memory), not_avoided(self.session_id, self.others))


def claimant(connection: Connection, session_id: str) -> Claimant | None:
    """None: the session has ended. What it claims while it is ended, `orphaned` finds."""
    me, other = sessions.alias("me"), sessions.alias("other")
    at_work = and_(
        other.c.model == me.c.model,
        other.c.id != me.c.id,
        other.c.closed_at.is_(None),
        other.c.expires_at >= now(),
        other.c.state.in_(AT_WORK),
    )
    query = (
        select(me.c.engine, me.c.memory, other.c.engine, func.coalesce(other.c.memory, 0))
        .outerjoin(other, at_work)
        .where(me.c.id == session_id, me.c.closed_at.is_(None))
    )
    rows = connection.execute(query).all()
    others: dict[str, int] = {}
    for mine, _, engine, has in rows:
        for asked in ("", engine) if engine == mine else ("",) if engine else ():
            others[asked] = max(has, others.get(asked, 0))
    return Claimant(session_id, rows[0][1], others) if rows else None


def memory_of(connection: Connection, session_id: str) -> int | None:
    """Bytes that a worker's engine may use; None when nobody knows."""
    query = select(sessions.c.memory).where(sessions.c.id == session_id)
    return connection.scalar(query)


def is_exceeded(connection: Connection, lane: Lane, memory: int) -> bool:
    """Whether a worker of the lane (engine '': of the model) has more bytes than `memory`.

    One that lives, or ended less than AWAY_S seconds ago.
    """
    last_seen = func.coalesce(sessions.c.closed_at, sessions.c.expires_at)
    query = select(sessions.c.id).where(last_seen >= now() - AWAY_S)
    query = query.where(sessions.c.model == lane.model)
    if lane.engine:
        query = query.where(sessions.c.engine == lane.engine)
    return connection.execute(query.where(sessions.c.memory > memory).limit(1)).first() is not None


def last(connection: Connection, lane: Lane, host: str, device: str) -> Row[Any, Any, Any] | None:
    """The newest session of a lane on a host, open or ended: device, memory, info.

    `device`: the beginning of its name, such as cuda or nothing.
    """
    query = (
        select(sessions.c.device, sessions.c.memory, sessions.c.info)
        .where(sessions.c.model == lane.model, sessions.c.engine == lane.engine)
        .where(sessions.c.host == host, sessions.c.device.startswith(device, autoescape=True))
        .order_by(sessions.c.opened_at.desc())
        .limit(1)
    )
    return connection.execute(query).first()


def origin(connection: Connection, lane: Lane) -> tuple[str, dict[str, str]] | None:
    """What the lane's newest session renders with: the SHA-256 of its weights, of each LoRA."""
    mine = (sessions.c.model == lane.model, sessions.c.engine == lane.engine)
    query = select(sessions.c.info).where(*mine).order_by(sessions.c.opened_at.desc()).limit(1)
    info = connection.scalar(query) or {}
    weights = info.get("weights_sha256")
    return (weights, dict(info.get("loras") or {})) if weights else None


def expired(connection: Connection) -> list[str]:
    """Open sessions whose time is over, by the database's clock."""
    query = select(sessions.c.id).where(
        sessions.c.closed_at.is_(None), sessions.c.expires_at < now()
    )
    return list(connection.scalars(query))


def orphaned(connection: Connection) -> list[str]:
    """Sessions that have ended, or are not there at all, and still hold running jobs."""
    opened = select(sessions.c.id).where(sessions.c.id == jobs.c.session_id)
    opened = opened.where(sessions.c.closed_at.is_(None))
    query = select(jobs.c.session_id).where(_RUNNING, ~opened.exists()).distinct()
    return list(connection.scalars(query))


def live(connection: Connection) -> list[Worker]:
    """Workers whose session is open and not expired."""
    query = (
        select(sessions, (now() - sessions.c.heartbeat_at).label("silent_s"))
        .where(IS_LIVE)
        .order_by(sessions.c.model, sessions.c.engine, sessions.c.opened_at)
    )
    names = Worker.__dataclass_fields__
    return [Worker(**{n: getattr(row, n) for n in names}) for row in connection.execute(query)]


def live_lanes(connection: Connection) -> dict[Lane, int]:
    """How many workers serve each lane now; those that rest do not."""
    query = (
        select(sessions.c.model, sessions.c.engine, func.count())
        .where(CAN_WORK)
        .group_by(sessions.c.model, sessions.c.engine)
    )
    return {Lane(model, engine): n for model, engine, n in connection.execute(query)}
