"""The tables. Times are seconds since 1970 in UTC, taken from the database's clock only.

The invariants stand here as CHECK constraints, so that no code path can break them. None compares
two times: the database's clock may be set back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Double,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    and_,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    text,
    true,
    tuple_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from farm.states import FINAL_STATES, JobState


class now(FunctionElement[float]):
    """The database's clock in seconds since 1970 (wall clock, also inside a transaction)."""

    type = Double()
    inherit_cache = True
    name = "now"


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def clock(connection: Connection) -> float:
    """What `now` is, asked for by itself."""
    return float(connection.scalars(select(now())).one())


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

STATES = tuple(JobState)
SESSION_STATES = ("idle", "rendering", "waiting", "resting")
EVENT_KINDS = ("requeued", "failed", "cancelled", "redriven", "repaired")


def _in(column: str, values: Any) -> str:
    return f"{column} IN ({', '.join(repr(str(v)) for v in sorted(values))})"


batches = Table(
    "batches",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", Text, nullable=False, server_default=""),
    Column("owner", Text, nullable=False, server_default=""),
    Column("priority", Integer, nullable=False, server_default="0"),  # larger goes first
    Column("params", JSON, nullable=False),  # what its jobs share, once
    Column("total", Integer, nullable=False, server_default="0"),
    Column("ready", Boolean, nullable=False, server_default=text("false")),  # may be claimed
    Column("whole", Boolean, nullable=False, server_default=text("false")),  # wholly submitted
    Column("digest", String(64), nullable=False, server_default=""),  # of its jobs so far, in order
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("after_id", ForeignKey("batches.id", ondelete="SET NULL")),  # waits until that is done
    Column("expires_at", Double),  # what has not begun by then is cancelled
    Column("reuse", Boolean, nullable=False, server_default=text("true")),  # pictures there are
    Column("created_at", Double, nullable=False),
    Column("touched_at", Double, nullable=False),  # last sign of its submitter
    Column("started_at", Double),  # first claim
    Column("finished_at", Double),  # last time that its last job reached a final state
    Column("idempotency_key", String(255)),  # of the request that made it, one an owner
    Column("request_sha256", String(64)),  # what that request held
    CheckConstraint("total >= 0", name="total_not_negative"),
    CheckConstraint("NOT whole OR ready", name="whole_is_ready"),
    CheckConstraint("finished_at IS NULL OR whole", name="finished_is_whole"),
    Index("ix_batches_idempotency", "owner", "idempotency_key", unique=True),
    Index(
        "ix_batches_open",
        "owner",
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
    Index(
        "ix_batches_after",
        "after_id",
        sqlite_where=text("after_id IS NOT NULL"),
        postgresql_where=text("after_id IS NOT NULL"),
    ),
)

# How many jobs of a batch stand in each state, by model and engine asked for; kept in
# the transaction of each transition. It is the answer to `status` and the backlog that claims are
# chosen from.
counts = Table(
    "batch_counts",
    metadata,
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("asked_engine", String(16), primary_key=True, server_default=""),  # as in jobs
    *(Column(state, Integer, nullable=False, server_default="0") for state in STATES),
    Column("claimed_at", Double),  # last claim
    *(CheckConstraint(f"{state} >= 0", name=f"{state}_not_negative") for state in STATES),
)
# No index but the primary key: a counter's update then writes none (PostgreSQL's HOT update).
# Who looks for work comes from ix_batches_open.

jobs = Table(
    "jobs",
    metadata,
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("idx", Integer, primary_key=True, autoincrement=False),  # place in the batch, from 0
    Column("model", String(63), nullable=False),
    Column("asked_engine", String(16), nullable=False, server_default=""),  # empty: any may
    Column("key", String(16), nullable=False),  # compatibility key
    Column("prompt", Text, nullable=False),
    Column("negative_prompt", Text, nullable=False, server_default=""),
    Column("seed", BigInteger, nullable=False),
    Column("params", JSON(none_as_null=True)),  # what differs from the batch's own
    Column("state", String(9), nullable=False, server_default=JobState.QUEUED),
    Column("claim_no", Integer, nullable=False, server_default="0"),  # only ever grows
    Column("failures", Integer, nullable=False, server_default="0"),  # what retry limits count
    Column("session_id", String(32)),
    Column("engine", String(16)),  # of the claim, then of the picture
    Column("started_at", Double),  # its own render began under the present claim
    Column("progress", Float, nullable=False, server_default="0"),  # 0..1 of the present claim
    Column("suspect", Boolean, nullable=False, server_default=text("false")),  # runs alone
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("not_before", Double),
    Column("needs_memory", BigInteger),  # more bytes than these, which did not suffice
    Column("avoid_session", String(32)),  # it failed there last: others first
    Column("finished_at", Double),
    Column("object_key", Text),
    Column("sha256", String(64)),
    Column("size_bytes", Integer),
    Column("render_s", Float),  # NULL: another job's picture was linked
    Column("fingerprint", String(64)),
    Column("error_code", String(40)),
    Column("error", Text),
    CheckConstraint(_in("state", STATES), name="state_known"),
    CheckConstraint(
        f"({_in('state', FINAL_STATES)}) = (finished_at IS NOT NULL)", name="final_has_time"
    ),
    CheckConstraint(
        "state <> 'succeeded' OR (object_key IS NOT NULL AND sha256 IS NOT NULL"
        " AND fingerprint IS NOT NULL)",
        name="succeeded_has_object",
    ),
    CheckConstraint("state <> 'failed' OR error_code IS NOT NULL", name="failed_has_code"),
    CheckConstraint("(state = 'running') = (session_id IS NOT NULL)", name="running_has_session"),
    CheckConstraint("(state = 'succeeded') = (object_key IS NOT NULL)", name="object_if_succeeded"),
    CheckConstraint("idx >= 0 AND claim_no >= 0 AND failures >= 0", name="numbers_not_negative"),
    CheckConstraint(
        "size_bytes >= 0 AND render_s >= 0 AND needs_memory >= 0", name="sizes_not_negative"
    ),
    CheckConstraint("progress >= 0 AND progress <= 1", name="progress_is_fraction"),
    CheckConstraint(
        "state <> 'queued' OR (engine IS NULL AND started_at IS NULL AND progress = 0)",
        name="queued_is_unbegun",
    ),
    CheckConstraint(
        "state <> 'running' OR (engine IS NOT NULL AND claim_no > 0)", name="running_has_claim"
    ),
    CheckConstraint(
        "state <> 'succeeded' OR (engine IS NOT NULL AND claim_no > 0 AND started_at IS NOT NULL"
        " AND size_bytes IS NOT NULL AND error_code IS NULL)",
        name="succeeded_was_claimed",
    ),
    CheckConstraint(
        "state <> 'failed' OR (claim_no > 0 AND failures > 0)", name="failed_has_failures"
    ),
    CheckConstraint("state <> 'cancelled' OR error_code IS NOT NULL", name="cancelled_has_code"),
    Index(
        "ix_jobs_queued",
        "batch_id",
        "model",
        "asked_engine",
        "idx",
        sqlite_where=text("state = 'queued'"),
        postgresql_where=text("state = 'queued'"),
    ),
    Index(
        "ix_jobs_held",
        "session_id",
        sqlite_where=text("state = 'running'"),
        postgresql_where=text("state = 'running'"),
    ),
    Index(
        "ix_jobs_needs_memory",
        "model",
        "asked_engine",
        "needs_memory",
        sqlite_where=text("state = 'queued' AND needs_memory IS NOT NULL"),
        postgresql_where=text("state = 'queued' AND needs_memory IS NOT NULL"),
    ),
    Index(
        "ix_jobs_failed",
        "batch_id",
        "error_code",
        "idx",
        sqlite_where=text("state = 'failed'"),
        postgresql_where=text("state = 'failed'"),
    ),
    Index(
        "ix_jobs_ended_badly",
        "batch_id",
        "state",
        "idx",
        sqlite_where=text("state IN ('failed', 'cancelled')"),
        postgresql_where=text("state IN ('failed', 'cancelled')"),
    ),
    Index(
        "ix_jobs_fingerprint",
        "fingerprint",
        sqlite_where=text("state = 'succeeded'"),
        postgresql_where=text("state = 'succeeded'"),
    ),
    Index(
        "ix_jobs_linked",
        "object_key",
        sqlite_where=text("state = 'succeeded' AND render_s IS NULL"),
        postgresql_where=text("state = 'succeeded' AND render_s IS NULL"),
    ),
)


def is_state(state: JobState) -> ColumnElement[bool]:
    """A literal, not a parameter: a prepared plan can use the partial indexes then."""
    return jobs.c.state == literal_column(f"'{state}'")


POOL_ORDER = (jobs.c.model, jobs.c.asked_engine, jobs.c.idx)


def in_pool(batch_id: Any, model: str, asked_engine: Any) -> ColumnElement[bool]:
    """Jobs of one batch, model and engine asked for, to be ordered by POOL_ORDER.

    Written as a range of rows, whose order only `ix_jobs_queued` has. With three equations
    PostgreSQL may walk the primary key instead, over a million jobs that ended long ago.
    """
    low = tuple_(jobs.c.model, jobs.c.asked_engine) >= tuple_(literal(model), asked_engine)
    high = tuple_(jobs.c.model, jobs.c.asked_engine) <= tuple_(literal(model), asked_engine)
    return and_(jobs.c.batch_id == batch_id, low, high)


def is_due() -> ColumnElement[bool]:
    """Queued, and not held back until later."""
    not_held_back = or_(jobs.c.not_before.is_(None), jobs.c.not_before <= now())
    return and_(is_state(JobState.QUEUED), not_held_back)


ANYWHERE = jobs.c.needs_memory.is_(None)
"""Jobs that any worker of a lane may take."""


def may_fit(memory: int | None) -> ColumnElement[bool]:
    """Not known to need more memory than a worker's `memory` in bytes (None: unknown)."""
    return ANYWHERE if memory is None else or_(ANYWHERE, jobs.c.needs_memory < memory)


AVOID_S = 60.0  # that a job which may run is kept from the worker that failed it last


def not_avoided(session_id: str, others: Mapping[str, int]) -> ColumnElement[bool]:
    """Did not fail in this session of late, or no other one can take it.

    `others`: by engine asked for, the most memory in bytes that another worker has (0: unknown).
    """
    able = [and_(jobs.c.asked_engine == asked, may_fit(memory)) for asked, memory in others.items()]
    if not able:
        return true()
    for_long = func.coalesce(jobs.c.not_before, 0.0) + AVOID_S <= now()
    here = jobs.c.avoid_session
    return or_(here.is_(None), here != session_id, for_long, not_(or_(*able)))


# Every change of a job's state that is not the plain way, with its reason.
events = Table(
    "job_events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE"), nullable=False),
    Column("idx", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("code", String(40)),
    Column("message", Text),
    Column("session_id", String(32)),
    Column("claim_no", Integer),
    CheckConstraint(_in("kind", EVENT_KINDS), name="kind_known"),
    Index("ix_job_events_job", "batch_id", "idx"),
)

# The input pictures that a batch's jobs name: they are kept as long as the batch.
batch_inputs = Table(
    "batch_inputs",
    metadata,
    Column("key", String(80), primary_key=True),
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Index("ix_batch_inputs_batch", "batch_id"),
)

# Objects whose last row was pruned: still in the blob store, and soon deleted there.
dropped_objects = Table(
    "dropped_objects",
    metadata,
    Column("key", Text, primary_key=True),
    Column("size_bytes", BigInteger),
)

# One life of a worker. The heartbeat is the lease of all it holds.
sessions = Table(
    "sessions",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("model", String(63), nullable=False),
    Column("engine", String(16), nullable=False),
    Column("device", String(32), nullable=False, server_default=""),
    Column("memory", BigInteger),  # bytes that its engine may use on the device
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("state", String(12), nullable=False, server_default="idle"),
    Column("note", Text, nullable=False, server_default=""),  # why it waits, for a person
    Column("info", JSON, nullable=False),  # versions, micro-batch: what the lane promises
    # and what a lack of memory taught it
    Column("rendered", Integer, nullable=False, server_default="0"),
    Column("stored_bytes", BigInteger, nullable=False, server_default="0"),
    Column("spooled", Integer, nullable=False, server_default="0"),  # pictures held on its disk
    Column("seconds_per_picture", Float),
    Column("opened_at", Double, nullable=False),
    Column("heartbeat_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("closed_at", Double),
    Column("lost", Boolean, nullable=False, server_default=text("false")),
    CheckConstraint(_in("state", SESSION_STATES), name="state_known"),
    CheckConstraint("NOT lost OR closed_at IS NOT NULL", name="lost_is_closed"),
    CheckConstraint(
        "rendered >= 0 AND stored_bytes >= 0 AND spooled >= 0 AND memory >= 0"
        " AND seconds_per_picture >= 0",
        name="figures_not_negative",
    ),
    Index(
        "ix_sessions_open",
        "expires_at",
        sqlite_where=text("closed_at IS NULL"),
        postgresql_where=text("closed_at IS NULL"),
    ),
)

# How much an owner may have at once; '*' stands for all who have no row. NULL: no limit.
owners = Table(
    "owners",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("max_queued", Integer),
    Column("max_running", Integer),
    CheckConstraint("max_queued >= 0 AND max_running >= 0", name="limits_not_negative"),
)

# When an owner was last given jobs of a model: among equals the longest unserved goes first.
turns = Table(
    "turns",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("at", Double, nullable=False),
)

# Who leads where one is enough, until when.
leases = Table(
    "leases",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("expires_at", Double, nullable=False),
)

# What is run again and again at its due times. See farm.schedules.
schedules = Table(
    "schedules",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("recipe", Text, nullable=False),  # an absolute path, read anew by each run
    Column("cron", Text, nullable=False),
    Column("tz", Text, nullable=False),
    Column("until", String(5)),  # local time at which its window closes; NULL: never
    Column("priority", Integer),  # NULL: the recipe's own
    Column("catch_up", Boolean, nullable=False, server_default=text("false")),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("owner", Text, nullable=False, server_default=""),
    Column("created_at", Double, nullable=False),
    Column("last_due", Double),  # the latest due time that was recorded
    Column("next_due", Double, nullable=False),
    Index("ix_schedules_name", "name", unique=True),
)

RUN_STATES = ("pending", "running", "waiting", "succeeded", "failed", "skipped")
RUN_KINDS = ("due", "manual")

# One row for each due time, so that none is run twice; `due_at` of a manual run is when it was
# asked for. Begun and not over is one run of a schedule at most.
schedule_runs = Table(
    "schedule_runs",
    metadata,
    Column("schedule_id", ForeignKey("schedules.id", ondelete="CASCADE"), primary_key=True),
    Column("due_at", Double, primary_key=True, autoincrement=False),
    Column("kind", String(6), nullable=False, server_default="due"),
    Column("state", String(9), nullable=False, server_default="pending"),
    Column("why", Text, nullable=False, server_default=""),  # it stands so, for a person
    Column("holder", String(64)),  # the dispatcher whose child carries it out
    Column("lease_until", Double),
    Column("batch_id", String(16)),  # no foreign key: batches are pruned, the history stays
    Column("started_at", Double),  # first start
    Column("finished_at", Double),
    Column("summary", JSON(none_as_null=True)),
    CheckConstraint(_in("kind", RUN_KINDS), name="kind_known"),
    CheckConstraint(_in("state", RUN_STATES), name="state_known"),
    CheckConstraint(
        f"({_in('state', RUN_STATES[3:])}) = (finished_at IS NOT NULL)", name="final_has_time"
    ),
    CheckConstraint("(state = 'running') = (holder IS NOT NULL)", name="running_is_held"),
    CheckConstraint("(holder IS NULL) = (lease_until IS NULL)", name="held_has_lease"),
    CheckConstraint(
        "state IN ('pending', 'skipped') OR started_at IS NOT NULL", name="begun_has_time"
    ),
    CheckConstraint("state <> 'skipped' OR started_at IS NULL", name="skipped_is_unbegun"),
    Index(
        "ix_schedule_runs_open",
        "schedule_id",
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
    Index(
        "ix_schedule_runs_under_way",
        "schedule_id",
        unique=True,
        sqlite_where=text("started_at IS NOT NULL AND finished_at IS NULL"),
        postgresql_where=text("started_at IS NOT NULL AND finished_at IS NULL"),
    ),
)

# One row: the oldest revision whose code works with this schema still. See farm.store.schema.
schema_floor = Table(
    "schema_floor", metadata, Column("revision", String(32), primary_key=True, nullable=False)
)

# Who may use the HTTP API. The secret itself is nowhere, its SHA-256 only.
tokens = Table(
    "api_tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", Text, nullable=False),
    Column("owner", Text, nullable=False, server_default=""),  # empty: sees every owner's batches
    Column("scopes", Text, nullable=False),  # joined by spaces
    Column("sha256", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)

__all__ = [
    "batch_inputs",
    "batches",
    "counts",
    "dropped_objects",
    "events",
    "func",
    "jobs",
    "metadata",
    "now",
    "schema_floor",
    "sessions",
    "tokens",
]
