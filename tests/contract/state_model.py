"""What a store must be after each step, told in plain Python: jobs, batches and sessions as dicts.

It knows neither SQL nor the code under test: every rule is written down here a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from farm.catalog import Lane
from farm.errors import (
    EngineFault,
    EngineKilled,
    EnvironmentFault,
    FarmError,
    Invalid,
    JobCancelled,
    JobGivenBack,
    OutOfMemory,
    WorkerLost,
)
from farm.store.ids import JobRef
from farm.store.jobs import Claim

MAX_FAILURES = 3
OPEN = ("queued", "running")
OF_LATE, LATER, LONG_AGO = "of late", "later", "long ago"  # what `not_before` may be


@dataclass
class MJob:
    ref: JobRef
    model: str
    asked: str
    key: str
    fingerprint: str
    state: str = "queued"
    claim_no: int = 0
    failures: int = 0
    session: str | None = None
    engine: str | None = None
    started: bool = False
    suspect: bool = False
    cancel_requested: bool = False
    not_before: str | None = None
    needs_memory: int | None = None
    avoid: str | None = None
    object_key: str | None = None
    code: str | None = None
    told: list[tuple[str, str | None, int]] = field(default_factory=list)  # kind, code, claim_no

    def holds(self, claim: Claim) -> bool:
        mine = (self.state, self.session, self.claim_no)
        return mine == ("running", claim.session_id, claim.claim_no)


@dataclass
class MBatch:
    id: str
    owner: str
    priority: int
    reuse: bool
    after: str | None
    deadline: bool  # it has one, which has not passed
    jobs: dict[int, MJob] = field(default_factory=dict)
    ready: bool = True
    whole: bool = True
    paused: bool = False
    cancelled: bool = False
    expired: bool = False
    finished: bool = False

    @property
    def open(self) -> bool:
        return any(job.state in OPEN for job in self.jobs.values())


@dataclass
class MSession:
    id: str
    lane: Lane
    memory: int | None
    state: str = "idle"
    expired: bool = False
    closed: bool = False
    lost: bool = False


class Model:
    """The whole store. A method that moves jobs returns what the real one must return."""

    def __init__(self) -> None:
        self.batches: dict[str, MBatch] = {}
        self.sessions: dict[str, MSession] = {}
        self.max_queued: dict[str, int | None] = {}
        self.max_running: dict[str, int | None] = {}
        self.dropped: set[str] = set()
        self.stored: set[str] = set()  # what lies in the blob store

    # ---- look

    @property
    def jobs(self) -> Iterable[MJob]:
        return (job for batch in self.batches.values() for job in batch.jobs.values())

    def job(self, ref: JobRef) -> MJob | None:
        batch = self.batches.get(ref.batch_id)
        return batch.jobs.get(ref.idx) if batch else None

    def holds(self, claim: Claim) -> bool:
        job = self.job(claim.ref)
        return job is not None and job.holds(claim)

    def at_work(self) -> list[MSession]:
        return [one for one in self.sessions.values() if not (one.closed or one.expired)]

    def handed_out(self) -> list[MBatch]:
        return [one for one in self.batches.values() if self.claimable(one)]

    def has_work_for(self, me: MSession) -> bool:
        return not me.closed and bool(self._pools(me))

    def under_way(self, owner: str, state: str, model: str | None = None) -> int:
        mine = (b for b in self.batches.values() if b.owner == owner and not b.finished)
        every = (job for batch in mine for job in batch.jobs.values())
        return sum(job.state == state and model in (None, job.model) for job in every)

    def limit(self, limits: dict[str, int | None], owner: str) -> int | None:
        return limits[owner] if owner in limits else limits.get("*")

    def claimable(self, batch: MBatch) -> bool:
        former = self.batches.get(batch.after or "")
        stopped = batch.finished or batch.paused or batch.cancelled or batch.expired
        return batch.ready and not stopped and (former is None or former.finished)

    def is_exceeded(self, lane: Lane, memory: int) -> bool:
        """Whether a session that lives, or ended of late, has more memory."""
        return any(
            session.lane.model == lane.model
            and lane.engine in ("", session.lane.engine)
            and (session.closed or not session.expired)
            and (session.memory or 0) > memory
            for session in self.sessions.values()
        )

    def _others_can(self, job: MJob, me: MSession) -> bool:
        def able(other: MSession) -> bool:
            at_work = other.state in ("idle", "rendering") and not (other.closed or other.expired)
            mine = other.lane.model == job.model and job.asked in ("", other.lane.engine)
            return at_work and mine and other.id != me.id

        most = max((one.memory or 0 for one in self.sessions.values() if able(one)), default=None)
        return most is not None and (job.needs_memory is None or job.needs_memory < most)

    def _may_take(self, job: MJob, me: MSession) -> bool:
        if job.state != "queued" or job.not_before == LATER:
            return False
        if job.needs_memory is not None and job.needs_memory >= (me.memory or 0):
            return False
        avoids = job.avoid == me.id and job.not_before == OF_LATE
        return not (avoids and self._others_can(job, me))

    def _pools(self, me: MSession) -> dict[tuple[str, str], list[MJob]]:
        """By batch and engine asked for: the jobs that a session may take now, in order."""
        found: dict[tuple[str, str], list[MJob]] = {}
        for batch in filter(self.claimable, self.batches.values()):
            most = self.limit(self.max_running, batch.owner)
            if most is not None and self.under_way(batch.owner, "running") >= most:
                continue
            for asked in ("", me.lane.engine):
                mine = [
                    j for j in batch.jobs.values() if (j.model, j.asked) == (me.lane.model, asked)
                ]
                if due := [job for job in mine if self._may_take(job, me)]:
                    found[batch.id, asked] = sorted(due, key=lambda job: job.ref.idx)
        return found

    # ---- claims

    def claim(self, session_id: str, limit: int, got: Sequence[Claim]) -> None:
        """Check a bundle, whatever batch it is of, and note it."""
        me = self.sessions[session_id]
        pools = {} if me.closed else self._pools(me)
        if not pools:
            assert not got, f"{got} were not to be had"
            return
        assert got, f"nothing was claimed of {pools}"
        batch = self.batches[got[0].ref.batch_id]
        asked = got[0].spec.engine or ""
        assert (batch.id, asked) in pools, f"{batch.id} {asked!r} gives nothing out"
        assert self._rank(batch, me) == min(
            self._rank(self.batches[one], me) for one, _ in pools
        ), "another batch was first"
        most = self.limit(self.max_running, batch.owner)
        room = limit if most is None else most - self.under_way(batch.owner, "running")
        first, *rest = pools[batch.id, asked]
        alike = [] if first.suspect else [j for j in rest if j.key == first.key and not j.suspect]
        wanted = [first, *alike][: max(1, min(limit, room))]
        assert [claim.ref for claim in got] == [job.ref for job in wanted]
        for job, claim in zip(wanted, got, strict=True):
            job.claim_no += 1
            assert (claim.claim_no, claim.session_id) == (job.claim_no, session_id)
            assert (claim.failures, claim.suspect) == (job.failures, job.suspect)
            assert claim.spec.fingerprint("fake", "0" * 64) == job.fingerprint
            job.state, job.session, job.engine = "running", session_id, me.lane.engine
            job.started, job.not_before = False, None

    def _rank(self, batch: MBatch, me: MSession) -> tuple[int, int]:
        return -batch.priority, self.under_way(batch.owner, "running", me.lane.model)

    def start(self, claims: Iterable[Claim]) -> None:
        for claim in filter(self.holds, claims):
            self._held(claim).started = True

    def _held(self, claim: Claim) -> MJob:
        job = self.job(claim.ref)
        assert job is not None
        return job

    def succeed(self, keys: dict[Claim, str]) -> set[JobRef]:
        """Of each claim the key of its picture."""
        moved = set()
        for claim, key in keys.items():
            job = self.job(claim.ref)
            if job and job.holds(claim):
                job.state, job.session, job.object_key = "succeeded", None, key
                job.started, job.suspect, job.code = True, False, None
                self._close(job.ref.batch_id)
            if job and job.object_key == key:
                moved.add(claim.ref)
        return moved

    def settle(self, claim: Claim, error: FarmError) -> bool:
        """What farm.verdict says must happen, by the class of the error."""
        if not self.holds(claim):
            return False
        job = self._held(claim)
        if isinstance(error, OutOfMemory):
            memory = self.sessions[claim.session_id].memory
            lane = Lane(job.model, job.asked)
            if memory is None or not self.is_exceeded(lane, memory):
                self._fail(job, error)
            elif self._back(job, error):
                job.needs_memory = memory
        elif isinstance(error, Invalid):
            self._fail(job, error)
        elif isinstance(error, JobCancelled | JobGivenBack):
            self._back(job, error)
        elif isinstance(error, EnvironmentFault):
            self._back(job, error, delay=True, avoid=True)
        else:
            self._blame(job, error)
        return True

    def _blame(self, job: MJob, error: FarmError) -> None:
        crash = isinstance(error, EngineFault)
        own = crash and not isinstance(error, EngineKilled | WorkerLost)
        if (job.suspect and own) or job.failures + 1 >= MAX_FAILURES:
            self._fail(job, error)
        elif self._back(job, error, delay=not crash, avoid=True):
            job.failures += 1
            job.suspect = job.suspect or crash

    def _fail(self, job: MJob, error: FarmError) -> None:
        job.failures += 1
        self._leave(job, "failed", error)
        self._close(job.ref.batch_id)

    def _back(
        self, job: MJob, error: FarmError, *, delay: bool = False, avoid: bool = False
    ) -> bool:
        """To the queue; to cancelled, and False, if a person asked for that."""
        if job.cancel_requested:
            job.cancel_requested = False
            self._leave(job, "cancelled", JobCancelled())
            self._close(job.ref.batch_id)
            return False
        if avoid:
            job.avoid = job.session
        job.not_before = LATER if delay else OF_LATE if avoid else None
        self._leave(job, "queued", error)
        job.engine, job.started = None, False
        return True

    def _leave(self, job: MJob, state: str, error: FarmError) -> None:
        kinds = {"failed": "failed", "cancelled": "cancelled", "queued": "requeued"}
        job.told.append((kinds[state], error.code, job.claim_no))
        job.state, job.session, job.code = state, None, error.code

    def _close(self, batch_id: str) -> None:
        batch = self.batches[batch_id]
        if batch.whole and not batch.open:
            batch.finished = True

    # ---- persons

    def cancel(self, batch_id: str, idx: int | None, code: str) -> int:
        """Queued jobs are cancelled with a code; running ones are asked to stop if a person did."""
        batch = self.batches[batch_id]
        moved = 0
        for job in batch.jobs.values():
            if idx not in (None, job.ref.idx):
                continue
            if job.state == "queued":
                job.state, job.code, job.not_before = "cancelled", code, None
                job.cancel_requested = False
                job.told.append(("cancelled", code, job.claim_no))
                moved += 1
            elif job.state == "running" and code == JobCancelled.code:
                job.cancel_requested = True
        if moved:
            self._close(batch_id)
        return moved

    def redrive(self, batch_id: str, states: Sequence[str], idx: int | None, code: str) -> int:
        batch = self.batches[batch_id]
        moved = 0
        for job in batch.jobs.values():
            here = job.state in states and idx in (None, job.ref.idx)
            if here and code in ("", job.code):
                job.state, job.failures, job.suspect = "queued", 0, False
                job.not_before = job.needs_memory = job.avoid = job.code = job.engine = None
                job.cancel_requested = job.started = False
                job.told.append(("redriven", None, job.claim_no))
                moved += 1
        if moved:
            batch.finished = batch.cancelled = batch.expired = False
        return moved

    def end_stopped(self) -> None:
        for batch in self.batches.values():
            if batch.finished and not batch.open:
                continue
            if batch.cancelled:
                self.cancel(batch.id, None, JobCancelled.code)
            elif batch.expired:
                self.cancel(batch.id, None, "ERR_EXPIRED")

    # ---- upkeep

    def reconcile(self, *, lenient: bool) -> None:
        silent = [s for s in self.sessions.values() if s.expired and not s.closed and not lenient]
        ended = [session for session in self.sessions.values() if session.closed]
        for session in silent:
            session.closed = session.lost = True
            self._release(session)
        if not lenient:
            self._free_the_needy()
        for session in ended:
            self._release(session)

    def _release(self, session: MSession) -> None:
        for job in [job for job in self.jobs if job.session == session.id]:
            if job.started:
                self._blame(job, WorkerLost())
            else:
                self._back(job, JobGivenBack())

    def _free_the_needy(self) -> None:
        for job in self.jobs:
            waits = job.needs_memory if job.state == "queued" else None
            if waits is not None and not self.is_exceeded(Lane(job.model, job.asked), waits):
                job.needs_memory = None

    def prune(self, batch_id: str, limit: int) -> tuple[int, bool, bool]:
        """(jobs gone, the batch is gone, it is kept since it is not done)."""
        batch = self.batches[batch_id]
        if not batch.whole or batch.open:
            return 0, False, True
        gone = [batch.jobs.pop(idx) for idx in sorted(batch.jobs)[:limit]]
        named = {job.object_key for job in self.jobs}
        self.dropped |= {job.object_key for job in gone if job.object_key} - named
        if not gone:
            self.remove(batch_id)
        return len(gone), not gone, False

    def remove(self, batch_id: str) -> None:
        del self.batches[batch_id]
        for other in self.batches.values():
            if other.after == batch_id:
                other.after = None

    def release(self, batch_id: str) -> None:
        """It is whole: no more jobs come."""
        batch = self.batches[batch_id]
        batch.ready = batch.whole = True
        self._close(batch_id)

    def counters(self, batch: MBatch) -> Counter[tuple[str, str, str]]:
        return Counter((job.model, job.asked, job.state) for job in batch.jobs.values())
