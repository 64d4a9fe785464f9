"""The stage of the store's state machine: a database that breaks, a model, and what must hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import Connection, delete, event, select

from farm.states import FINAL_STATES, JobState
from farm.store import batches, jobs, prune
from farm.store import tables as t
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from tests.contract.state_model import MBatch, MJob, Model, MSession

T = TypeVar("T")


class Torn(Exception):
    """The connection broke: the transaction is rolled back, or its answer is lost."""


class Fragile(Database):
    """Breaks the first transaction after it is told to: before a statement, or after the commit."""

    tear: int | str | None = None
    _writing = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        event.listen(self.engine, "before_cursor_execute", self._count)

    def _count(self, *_: Any) -> None:
        if isinstance(self.tear, int) and self._writing:
            self.tear -= 1
            if self.tear < 0:
                raise Torn

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with super().write() as connection:
            self._writing = True
            try:
                yield connection
                if isinstance(self.tear, int):
                    raise Torn
            finally:
                self._writing = False
        if self.tear == "answer":
            raise Torn


@dataclass(frozen=True)
class Action:
    """One thing that somebody may do. `weight`: how often, beside the others."""

    name: str
    weight: int
    when: Callable[[Any], bool]
    arguments: dict[str, st.SearchStrategy[Any]]


def action(
    weight: int = 1, when: Callable[[Any], bool] = bool, **arguments: st.SearchStrategy[Any]
) -> Callable[[T], T]:
    """Marks a method of a Stage as an action, whose arguments are drawn.

    Rules of Hypothesis' own all come equally often, or are left out of a whole example: so work
    was hardly ever submitted, claimed and settled in one.
    """

    def mark(method: Any) -> Any:
        method.action = Action(method.__name__, weight, when, arguments)
        return method

    return mark


class Stage(RuleBasedStateMachine):
    """Invariants compare all tables with the model after each step."""

    db: ClassVar[Fragile]
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.claims: list[Claim] = []  # all that anyone ever held, the newest last
        self.keys: dict[str, str] = {}  # idempotency key and owner: batch
        self.db.tear = None
        with self.db.write() as connection:
            for table in reversed(t.metadata.sorted_tables):
                if table is not t.schema_floor:
                    connection.execute(delete(table))

    @rule(data=st.data())
    def acts(self, data: st.DataObject) -> None:
        every = [getattr(getattr(type(self), name), "action", None) for name in dir(type(self))]
        able = {one.name: one for one in every if one and one.when(self)}
        names = [name for name, one in able.items() for _ in range(one.weight)]
        name = data.draw(st.sampled_from(names))
        getattr(self, name)(**data.draw(st.fixed_dictionaries(able[name].arguments)))

    def _do(self, work: Callable[[Connection], T], tear: int | str | None = None) -> T | None:
        """One writing transaction; None: it was rolled back. A lost answer is known to the test."""
        found: list[T] = []
        self.db.tear = tear
        with suppress(Torn), self.db.write() as connection:
            found.append(work(connection))
        self.db.tear = None
        self.seen["torn"] += tear is not None
        return None if isinstance(tear, int) else found[0]

    def _some(self, numbers: Sequence[int], whose: str = "any") -> list[Claim]:
        """Claims, the newest first: `any`, those that `hold`, or ghosts whose job runs again."""
        held = [claim for claim in self.claims if self.model.holds(claim)]
        running = {claim.ref for claim in held}
        ghosts = [one for one in self.claims if one not in held and one.ref in running]
        pool = {"hold": held, "rival": ghosts}.get(whose) or self.claims
        some = list({pool[-1 - n % len(pool)]: None for n in numbers})
        self.seen["ghosts"] += sum(claim not in held for claim in some)
        return some

    def _batch(self, n: int, wanted: Callable[[MBatch], bool] = bool) -> MBatch:
        """The newest first; of those that are wanted, if there are any."""
        every = list(self.model.batches.values())
        some = [batch for batch in every if wanted(batch)] or every
        return some[-1 - n % len(some)]

    def _session(self, n: int) -> MSession:
        return list(self.model.sessions.values())[-1 - n % len(self.model.sessions)]

    # ---- what must hold after each step

    @invariant()
    def all_tables_are_as_the_model_says(self) -> None:
        type(self).steps += 1
        with self.db.read() as connection:
            self._check_jobs(connection)
            self._check_counters(connection)
            self._check_batches(connection)
            self._check_sessions(connection)
            self._check_events(connection)
            assert set(prune.dropped(connection, 1000)) == self.model.dropped

    def _check_jobs(self, connection: Connection) -> None:
        found = {}
        for row in connection.execute(select(t.jobs)):
            ref = JobRef(row.batch_id, row.idx)
            found[ref] = _shown(row)
            assert (row.finished_at is not None) == (row.state in FINAL_STATES)
            assert (row.session_id is not None) == (row.state == "running")
            if row.state == "succeeded":
                assert None not in (row.sha256, row.fingerprint)
                assert row.progress == 1.0
                assert row.object_key in self.model.stored, "a succeeded job without its object"
        assert found == {job.ref: _wanted(job) for job in self.model.jobs}

    def _check_counters(self, connection: Connection) -> None:
        for row in connection.execute(select(t.counts)):
            counted = self.model.counters(self.model.batches[row.batch_id])
            for state in JobState:
                pool = (row.model, row.asked_engine, str(state))
                assert getattr(row, state) == counted.pop(pool, 0), (row.batch_id, pool)
        for batch in self.model.batches.values():
            full = jobs.count_states(connection, batch.id)
            status = batches.status(connection, batch.id)
            assert {s: n for s, n in status.counts.items() if n} == full
            assert sum(full.values()) == len(batch.jobs) == status.total

    def _check_batches(self, connection: Connection) -> None:
        found = {
            row.id: (row.ready, row.whole, row.paused, row.cancel_requested, row.after_id,
                     row.finished_at is not None)
            for row in connection.execute(select(t.batches))
        }  # fmt: skip
        assert found == {
            b.id: (b.ready, b.whole, b.paused, b.cancelled, b.after, b.finished)
            for b in self.model.batches.values()
        }
        for batch in self.model.batches.values():
            assert batch.finished == (batch.whole and not batch.open)

    def _check_sessions(self, connection: Connection) -> None:
        found = {
            row.id: (row.state, row.closed_at is not None, row.lost)
            for row in connection.execute(select(t.sessions))
        }
        wanted = {s.id: (s.state, s.closed, s.lost) for s in self.model.sessions.values()}
        assert found == wanted

    def _check_events(self, connection: Connection) -> None:
        told: dict[Any, list[Any]] = {job.ref: [] for job in self.model.jobs}
        arrows = t.events.c.kind.in_(("requeued", "failed", "cancelled", "redriven"))
        for row in connection.execute(select(t.events).where(arrows).order_by(t.events.c.id)):
            told[JobRef(row.batch_id, row.idx)].append((row.kind, row.code, row.claim_no))
        assert told == {job.ref: job.told for job in self.model.jobs}


def _shown(row: Any) -> tuple[Any, ...]:
    return (
        row.state, row.claim_no, row.failures, row.session_id, row.engine,
        row.started_at is not None, row.suspect, row.cancel_requested, row.needs_memory,
        row.avoid_session, row.object_key, row.error_code, row.fingerprint,
        row.not_before is not None,
    )  # fmt: skip


def _wanted(job: MJob) -> tuple[Any, ...]:
    return (
        job.state, job.claim_no, job.failures, job.session, job.engine, job.started, job.suspect,
        job.cancel_requested, job.needs_memory, job.avoid, job.object_key, job.code,
        job.fingerprint if job.state == "succeeded" else None, job.not_before is not None,
    )  # fmt: skip
