"""The only writer of `jobs.state`: one function an arrow of TRANSITIONS.

Every arrow out of `running` is guarded in the WHERE by state, session and `claim_no`, so a ghost
whose job was given to another changes nothing; each returns the jobs that it really moved. The
counters of the batch move in the same transaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    FromClause,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)

from farm.catalog import Lane
from farm.errors import FarmError, InvalidParameter, JobCancelled, JobExpired
from farm.spec import JobSpec, record_fault
from farm.states import FINAL_STATES, JobState, may_become
from farm.store.ids import JobRef
from farm.store.rows import rows
from farm.store.tables import (
    ANYWHERE,
    POOL_ORDER,
    batches,
    counts,
    events,
    in_pool,
    is_due,
    is_state,
    jobs,
    now,
)

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobState
WINDOW = 1024  # places after the first waiting job among which jobs of its key are looked for


@dataclass(frozen=True)
class Claim:
    """A session's right to run one job, fenced by `claim_no`."""

    ref: JobRef
    claim_no: int
    session_id: str
    spec: JobSpec
    failures: int = 0
    suspect: bool = False

    def __hash__(self) -> int:  # the job's texts need not be read for it
        return hash((self.ref, self.claim_no))


@dataclass(frozen=True)
class Picture:
    """What is recorded of a stored picture."""

    object_key: str
    sha256: str
    size_bytes: int
    render_s: float | None  # None: it was rendered for another job
    fingerprint: str


Pool = tuple[str, str, str]
"""Jobs that are counted together: of one batch, one model and one engine asked for ('': any)."""


def _pool_of(held: Claim) -> Pool:
    return (held.ref.batch_id, held.spec.model, held.spec.engine or "")


def counter_of(pool: Pool) -> ColumnElement[bool]:
    batch_id, model, asked = pool
    return and_(
        counts.c.batch_id == batch_id, counts.c.model == model, counts.c.asked_engine == asked
    )


class _Tally:
    """The moves of one transaction, written to the counters at its end."""

    def __init__(self) -> None:
        self.moves: dict[Pool, Counter[JobState]] = {}

    def move(self, pool: Pool, old: JobState, new: JobState, n: int = 1) -> None:
        assert may_become(old, new), f"no arrow {old} -> {new}"
        counter = self.moves.setdefault(pool, Counter())
        counter[old] -= n
        counter[new] += n

    def write(self, connection: Connection, **also: Any) -> None:
        for pool, counter in sorted(self.moves.items()):
            moved = {str(s): counts.c[s] + n for s, n in counter.items() if n}
            changed = {**moved, **also} if moved else {}
            if changed:
                connection.execute(update(counts).where(counter_of(pool)).values(changed))
        finals = {p[0] for p, c in self.moves.items() if any(c[s] > 0 for s in FINAL_STATES)}
        for batch_id in sorted(finals):
            close_if_finished(connection, batch_id)


def close_if_finished(connection: Connection, batch_id: str) -> None:
    """Note the time when the last job of a batch has ended."""
    row = select(batches.c.id).where(batches.c.id == batch_id)
    connection.execute(row.with_for_update(key_share=True)).all()  # then look with a new snapshot
    left = and_(counts.c.batch_id == batch_id, counts.c.queued + counts.c.running > 0)
    connection.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.whole, ~exists().where(left))
        .values(finished_at=now())
    )


def claim(
    connection: Connection,
    batch_id: str,
    shared: dict[str, Any],
    session_id: str,
    lane: Lane,
    limit: int,
    asked: str = "",
    may: ColumnElement[bool] = ANYWHERE,
) -> list[Claim]:
    """queued -> running: the batch's next rows of one key, in order; a suspect comes alone.

    `asked`: those that ask for this engine, which must be the lane's; '': those that ask for none.
    `may`: the jobs that this worker may take; the rest is left to others.
    """
    pool = in_pool(batch_id, lane.model, asked)
    in_order = select(jobs.c.idx).where(pool, is_due(), may).order_by(*POOL_ORDER)
    in_order = in_order.with_for_update(skip_locked=True)
    head = connection.execute(in_order.add_columns(jobs.c.key, jobs.c.suspect).limit(1)).first()
    if head is None:
        return []
    chosen = [head.idx]
    if not head.suspect and limit > 1:
        near = jobs.c.idx.between(head.idx, head.idx + WINDOW - 1)
        alike = in_order.where(near, jobs.c.key == head.key, ~jobs.c.suspect).limit(limit)
        chosen = list(connection.scalars(alike))
    given = rows(connection, _PLACE, [(batch_id, idx, QUEUED.value) for idx in chosen])
    moved = connection.execute(
        update(jobs)
        .where(*_same(_PLACE, given))
        .values(
            state=RUNNING,
            session_id=session_id,
            engine=lane.engine,
            claim_no=jobs.c.claim_no + 1,
            started_at=None,
            progress=0.0,
            not_before=None,
        )
        .returning(*_CLAIMED)
    ).all()
    tally = _Tally()
    tally.move((batch_id, lane.model, asked), QUEUED, RUNNING, len(moved))
    tally.write(connection, claimed_at=now())
    started = batches.c.started_at.is_(None)
    connection.execute(
        update(batches).where(batches.c.id == batch_id, started).values(started_at=now())
    )
    good, bad = _claims_of(sorted(moved, key=lambda row: row.idx), shared, session_id)
    for held, fault in bad:
        fail(connection, held, fault)
    return good


_SPEC_COLUMNS = ("model", "prompt", "negative_prompt", "seed")
_ANY_TEXTS = {"prompt": "-", "negative_prompt": "", "seed": 0}  # a shape is judged without its own
_CLAIMED = [
    jobs.c[name]
    for name in (
        "batch_id", "idx", "claim_no", "failures", "suspect", "params", "asked_engine",
        *_SPEC_COLUMNS,
    )
]  # fmt: skip


def spec_of(row: Any, shared: dict[str, Any]) -> JobSpec:
    """The whole JobSpec of a row and its batch's shared parameters (validated when submitted)."""
    return JobSpec.from_record(_fields_of(row, shared))


def _fields_of(row: Any, shared: Any) -> dict[str, Any]:
    own = {name: getattr(row, name) for name in _SPEC_COLUMNS}
    own["engine"] = row.asked_engine or None
    fields: dict[str, Any] = {}
    for params in (shared, row.params):
        if params is not None:  # what is no mapping is kept, for record_fault to see
            fields |= params if isinstance(params, dict) else {"params": params}
    return fields | own


def _claims_of(
    rows: Sequence[Any], shared: Any, session_id: str
) -> tuple[list[Claim], list[tuple[Claim, InvalidParameter]]]:
    """Claims of one pool, and those whose record is none that was ever submitted, with why.

    Jobs whose parameters are the same differ in their texts and seeds only, and are checked once.
    """
    shapes: dict[str, tuple[JobSpec, InvalidParameter | None]] = {}
    good, bad = [], []
    for row in rows:
        shape = repr(row.params)
        if shape not in shapes:
            fields = _fields_of(row, shared)
            shapes[shape] = JobSpec.from_record(fields), record_fault(fields | _ANY_TEXTS)
        spec, fault = shapes[shape]
        ref = JobRef(row.batch_id, row.idx)
        spec = spec.like_this(row.prompt, row.negative_prompt, row.seed)
        claim = Claim(ref, row.claim_no, session_id, spec, row.failures, row.suspect)
        if fault:
            bad.append((claim, fault))
        else:
            good.append(claim)
    return good, bad


def _claim_of(row: Any, shared: dict[str, Any], session_id: str) -> Claim:
    ref = JobRef(row.batch_id, row.idx)
    spec = spec_of(row, shared)
    return Claim(ref, row.claim_no, session_id, spec, row.failures, row.suspect)


def held_by(connection: Connection, session_id: str) -> list[tuple[Claim, bool]]:
    """What a session holds: each claim, and whether its own render had started."""
    rows = connection.execute(
        select(*_CLAIMED, jobs.c.started_at, batches.c.params.label("shared"))
        .join(batches, batches.c.id == jobs.c.batch_id)
        .where(jobs.c.session_id == session_id, is_state(RUNNING))
    )
    return [(_claim_of(r, r.shared, session_id), r.started_at is not None) for r in rows]


def lock(connection: Connection, held: Sequence[Claim]) -> None:
    """Take jobs, then counters, then batches of these claims, each in order.

    Whoever moves several jobs in one transaction takes locks in this order, so that no two wait
    for each other. SQLite has one writer at a time.
    """
    if not held or connection.dialect.name == "sqlite":
        return
    mine = rows(connection, _FENCE, [_fence(claim) for claim in held])
    guarded = select(jobs.c.idx).where(*_same(_FENCE, mine))
    locked = guarded.order_by(jobs.c.batch_id, jobs.c.idx).with_for_update(of=jobs).subquery()
    connection.execute(select(func.count()).select_from(locked))  # one row to fetch
    for pool in sorted({_pool_of(claim) for claim in held}):
        connection.execute(select(counts.c.model).where(counter_of(pool)).with_for_update()).all()
    for batch_id in sorted({claim.ref.batch_id for claim in held}):
        whole = select(batches.c.id).where(batches.c.id == batch_id)
        connection.execute(whole.with_for_update(key_share=True)).all()


_PLACE = (jobs.c.batch_id, jobs.c.idx, jobs.c.state)
_FENCE = (*_PLACE, jobs.c.session_id, jobs.c.claim_no)
_RUNNING = RUNNING.value


def _fence(held: Claim) -> tuple[Any, ...]:
    return *held.ref, _RUNNING, held.session_id, held.claim_no


def _same(columns: Iterable[Column[Any]], given: FromClause) -> list[ColumnElement[bool]]:
    """The jobs that agree with a row of `given` in all of these columns.

    No part of this is a constant, so that PostgreSQL looks each job up by its place: knowing too
    little (nothing at first) of a million new rows, it may take those of one batch, or those that
    run, for so few that it reads them all.
    """
    return [jobs.c[column.name] == given.c[column.name] for column in columns]


_GUARD = and_(
    jobs.c.batch_id == bindparam("g_batch"),
    jobs.c.idx == bindparam("g_idx"),
    is_state(RUNNING),
    jobs.c.session_id == bindparam("g_session"),
    jobs.c.claim_no == bindparam("g_claim"),
)


def _guarded(
    connection: Connection, held: Claim, values: dict[str, Any], *more: ColumnElement[bool]
) -> bool:
    """Update the row if the claim still holds; whether it did."""
    guard = {"g_batch": held.ref.batch_id, "g_idx": held.ref.idx}
    guard |= {"g_session": held.session_id, "g_claim": held.claim_no}
    statement = update(jobs).where(_GUARD, *more).values(values)
    return bool(connection.execute(statement, guard).rowcount)


def _guarded_many(
    connection: Connection,
    held: Sequence[Claim],
    values: dict[str, Any],
    columns: Sequence[Column[Any]] = (),
    own: Sequence[Sequence[Any]] = (),
) -> int:
    """Update the rows whose claims still hold; how many did.

    `own`: for each claim its values of `columns`. A statement for each row would cost ten times
    as much.
    """
    if not held:
        return 0
    own = own or [()] * len(held)
    fenced = [(*_fence(claim), *some) for claim, some in zip(held, own, strict=True)]
    mine = rows(connection, (*_FENCE, *columns), fenced)
    bound = {column.name: mine.c[column.name] for column in columns}
    guard = _same(_FENCE, mine)
    changed = connection.execute(update(jobs).where(*guard).values({**values, **bound}))
    return changed.rowcount


def mark_started(connection: Connection, held: Sequence[Claim]) -> None:
    """Note that these jobs' own renders began: should the worker die now, they are suspects."""
    _guarded_many(connection, held, {"started_at": now()})


def record_progress(connection: Connection, progress: Iterable[tuple[Claim, float]]) -> None:
    """Note how far running jobs are, 0 to 1."""
    fractions = dict(progress)
    own = [(fraction,) for fraction in fractions.values()]
    _guarded_many(connection, list(fractions), {}, [jobs.c.progress], own)


_PICTURE = tuple(jobs.c[field.name] for field in fields(Picture))
_values_of = attrgetter(*(field.name for field in fields(Picture)))


def succeed(connection: Connection, done: Sequence[tuple[Claim, Picture]]) -> set[JobRef]:
    """running -> succeeded, for stored pictures. A ref not returned: its claim was lost."""
    pools: dict[Pool, list[tuple[Claim, Picture]]] = {}
    for held, picture in done:
        pools.setdefault(_pool_of(held), []).append((held, picture))
    values = {
        "state": SUCCEEDED,
        "session_id": None,
        "started_at": func.coalesce(jobs.c.started_at, now()),
        "finished_at": now(),
        "progress": 1.0,
        "suspect": False,
        "error_code": None,
        "error": None,
    }
    tally, moved = _Tally(), set[JobRef]()
    for pool, some in pools.items():
        claims = [held for held, _ in some]
        own = [_values_of(picture) for _, picture in some]
        changed = _guarded_many(connection, claims, values, _PICTURE, own)
        tally.move(pool, RUNNING, SUCCEEDED, changed)
        if changed == len(some):
            moved.update(held.ref for held in claims)
        else:
            moved |= {h.ref for h, p in some if _recorded(connection, h.ref, p.object_key)}
    tally.write(connection)
    return moved


def _recorded(connection: Connection, ref: JobRef, object_key: str) -> bool:
    """Whether this very picture stands in the record, be it that only its answer was lost."""
    mine = and_(jobs.c.batch_id == ref.batch_id, jobs.c.idx == ref.idx)
    query = select(jobs.c.idx).where(mine, jobs.c.object_key == object_key)
    return connection.execute(query).first() is not None


def fail(connection: Connection, held: Claim, error: FarmError) -> bool:
    """running -> failed: a permanent error, or the job's failures are used up."""
    values = {
        "state": FAILED,
        "session_id": None,
        "finished_at": now(),
        "failures": jobs.c.failures + 1,
        "error_code": error.code,
        "error": error.message,
    }
    return _leave(connection, held, FAILED, values, error)


def requeue(
    connection: Connection,
    held: Claim,
    error: FarmError,
    *,
    count: bool = False,
    suspect: bool = False,
    delay_s: float = 0.0,
    needs_memory: int | None = None,
    avoid: bool = False,
) -> bool:
    """running -> queued: retry, lease expired or shutdown; to cancelled if that was asked for.

    `avoid`: this session gets it again when no other can take it, or none has for AVOID_S seconds.
    `needs_memory`: only workers with more than so many bytes may claim it from now on.
    """
    if cancel_running(connection, held, if_requested=True):
        return True
    values = {
        "state": QUEUED,
        "session_id": None,
        "engine": None,
        "started_at": None,
        "progress": 0.0,
        "failures": jobs.c.failures + int(count),
        "not_before": now() + delay_s if delay_s or avoid else None,
        "error_code": error.code,
        "error": error.message,
    }
    if suspect:
        values["suspect"] = True
    if avoid:
        values["avoid_session"] = held.session_id
    if needs_memory is not None:
        values["needs_memory"] = needs_memory
    return _leave(connection, held, QUEUED, values, error)


def cancel_running(connection: Connection, held: Claim, *, if_requested: bool = False) -> bool:
    """running -> cancelled: the cancel was seen between steps."""
    error = JobCancelled()
    values = {
        "state": CANCELLED,
        "session_id": None,
        "finished_at": now(),
        "cancel_requested": False,
        "error_code": error.code,
        "error": error.message,
    }
    wish = [jobs.c.cancel_requested] if if_requested else []
    return _leave(connection, held, CANCELLED, values, error, *wish)


_KINDS = {FAILED: "failed", QUEUED: "requeued", CANCELLED: "cancelled"}


def _leave(
    connection: Connection,
    held: Claim,
    new: JobState,
    values: dict[str, Any],
    error: FarmError,
    *more: ColumnElement[bool],
) -> bool:
    if not _guarded(connection, held, values, *more):
        return False
    tally = _Tally()
    tally.move(_pool_of(held), RUNNING, new)
    connection.execute(
        events.insert().values(
            batch_id=held.ref.batch_id,
            idx=held.ref.idx,
            at=now(),
            kind=_KINDS[new],
            code=error.code,
            message=error.message,
            session_id=held.session_id,
            claim_no=held.claim_no,
        )
    )
    tally.write(connection)
    return True


def _locked(
    connection: Connection,
    batch_id: str,
    idx: int | None,
    where: ColumnElement[bool],
    order: Sequence[ColumnElement[Any]],
    limit: int,
) -> dict[JobState, list[int]]:
    """The first `limit` jobs of a batch that fulfil `where`, locked: places by state.

    `order`: the columns of the index that has them, so that no step looks at those before it. That
    is not the order of all others, so none is waited for, unless it is the only one: what another
    transaction holds just now, it moves, or the reconciler does.
    """
    chosen = select(jobs.c.idx, jobs.c.state).where(jobs.c.batch_id == batch_id, where)
    if idx is not None:
        chosen = chosen.where(jobs.c.idx == idx)
    found: dict[JobState, list[int]] = {}
    chosen = chosen.order_by(*order).limit(limit).with_for_update(skip_locked=idx is None)
    for row in connection.execute(chosen):
        found.setdefault(JobState(row.state), []).append(row.idx)
    return found


def request_cancel(
    connection: Connection, batch_id: str, idx: int | None = None, *, limit: int = 5000
) -> tuple[int, int]:
    """queued -> cancelled at once; running ones are asked to stop; at most `limit` of each.

    Returns (cancelled now, asked to stop). Call again until both are 0; of a whole batch after
    `batches.set_cancelled`, so that nothing is claimed meanwhile.
    """
    waiting = _locked(connection, batch_id, idx, is_state(QUEUED), POOL_ORDER, limit)
    # looked at later, so that a job which was claimed meanwhile is among them
    running = and_(is_state(RUNNING), ~jobs.c.cancel_requested)
    held = _locked(connection, batch_id, idx, running, [jobs.c.idx], limit).get(RUNNING, [])
    if held:
        mine = and_(jobs.c.batch_id == batch_id, jobs.c.idx.in_(held))
        connection.execute(update(jobs).where(mine).values(cancel_requested=True))
    return _cancel(connection, batch_id, waiting, JobCancelled()), len(held)


def expire(connection: Connection, batch_id: str, *, limit: int = 5000) -> int:
    """queued -> cancelled, since the batch's deadline has passed; how many, at most `limit`."""
    waiting = _locked(connection, batch_id, None, is_state(QUEUED), POOL_ORDER, limit)
    return _cancel(connection, batch_id, waiting, JobExpired())


def _cancel(
    connection: Connection, batch_id: str, waiting: dict[JobState, list[int]], error: FarmError
) -> int:
    values = {
        "finished_at": now(),
        "error_code": error.code,
        "error": error.message,
        "cancel_requested": False,
        "not_before": None,
    }
    return _move_waiting(connection, batch_id, waiting, CANCELLED, values, "cancelled")


def redrive(
    connection: Connection,
    batch_id: str,
    states: Sequence[JobState],
    *,
    idx: int | None = None,
    code: str | None = None,
    limit: int = 5000,
) -> int:
    """failed, cancelled -> queued by a person, at most `limit`; its failures start anew.

    That takes back a cancel of the whole batch, and a deadline that has passed.
    """
    where = or_(*(is_state(state) for state in states))
    if code:
        where = and_(where, jobs.c.error_code == code)
    found = _locked(connection, batch_id, idx, where, [jobs.c.state, jobs.c.idx], limit)
    fresh = {
        "finished_at": None,
        "failures": 0,
        "suspect": False,
        "not_before": None,
        "needs_memory": None,
        "avoid_session": None,
        "error_code": None,
        "error": None,
        "cancel_requested": False,
        "started_at": None,
        "progress": 0.0,
        "engine": None,
    }
    moved = _move_waiting(connection, batch_id, found, QUEUED, fresh, "redriven")
    if moved:
        passed = case((batches.c.expires_at <= now(), None), else_=batches.c.expires_at)
        connection.execute(
            update(batches)
            .where(batches.c.id == batch_id)
            .values(finished_at=None, cancel_requested=False, expires_at=passed)
        )
    return moved


def _move_waiting(
    connection: Connection,
    batch_id: str,
    places: dict[JobState, list[int]],
    new: JobState,
    values: dict[str, Any],
    kind: str,
) -> int:
    """Move locked jobs that no session holds, given by their old state; how many."""
    tally, total = _Tally(), 0
    for old, idxs in places.items():
        place = (jobs.c.batch_id, jobs.c.idx)
        mine = and_(*_same(place, rows(connection, place, [(batch_id, idx) for idx in idxs])))
        moved = connection.execute(
            update(jobs)
            .where(mine)
            .values(state=new, **values)
            .returning(jobs.c.model, jobs.c.asked_engine)
        ).all()
        for (model, asked), n in Counter(tuple(row) for row in moved).items():
            tally.move((batch_id, model, asked), old, new, n)
        told = ("batch_id", "idx", "claim_no", "at", "kind", "code", "message")
        why = (jobs.c.error_code, jobs.c.error)
        what = select(jobs.c.batch_id, jobs.c.idx, jobs.c.claim_no, now(), literal(kind), *why)
        connection.execute(events.insert().from_select(told, what.where(mine)))
        total += len(moved)
    tally.write(connection)
    return total


_NEEDY = and_(is_state(QUEUED), jobs.c.needs_memory.is_not(None))


class Need(NamedTuple):
    """So many queued jobs are known to need more than `memory` bytes.

    A lane with engine '' is any engine.
    """

    lane: Lane
    memory: int
    jobs: int


def memory_needs(connection: Connection) -> list[Need]:
    """What queued jobs are known to need."""
    pool = (jobs.c.model, jobs.c.asked_engine, jobs.c.needs_memory)
    found = connection.execute(select(*pool, func.count()).where(_NEEDY).group_by(*pool))
    return [Need(Lane(model, asked), memory, n) for model, asked, memory, n in found]


def free_of_need(connection: Connection, lane: Lane, needs_memory: int, limit: int = 5000) -> int:
    """Let any worker try the queued jobs of one such need again; how many, at most `limit`."""
    mine = (jobs.c.model == lane.model, jobs.c.asked_engine == lane.engine)
    rows = select(jobs.c.batch_id, jobs.c.idx).where(
        _NEEDY, *mine, jobs.c.needs_memory == needs_memory
    )
    rows = rows.order_by(jobs.c.batch_id, jobs.c.idx).limit(limit)
    places: dict[str, list[int]] = {}
    for batch_id, idx in connection.execute(rows.with_for_update(skip_locked=True)):
        places.setdefault(batch_id, []).append(idx)
    for batch_id, idxs in places.items():
        here = and_(jobs.c.batch_id == batch_id, jobs.c.idx.in_(idxs))
        connection.execute(update(jobs).where(here).values(needs_memory=None))
        why = "no worker has more memory than did not suffice; any may try it again"
        place = (jobs.c.batch_id, jobs.c.idx, jobs.c.claim_no)
        what = select(*place, now(), literal("repaired"), literal(why)).where(here)
        told = ("batch_id", "idx", "claim_no", "at", "kind", "message")
        connection.execute(events.insert().from_select(told, what))
    return sum(map(len, places.values()))


def count_states(connection: Connection, batch_id: str) -> dict[str, int]:
    """A full count, for audits; `batches.status` reads the counters instead."""
    rows = connection.execute(
        select(jobs.c.state, func.count()).where(jobs.c.batch_id == batch_id).group_by(jobs.c.state)
    )
    return {row[0]: row[1] for row in rows}
