"""The store under attack: random steps of many claimants, beside a model in plain Python.

A short form runs with the other tests. The long one is `make state` (HYPOTHESIS_PROFILE=nightly),
which goes on until it has made STATE_STEPS steps on each database. A step is one thing that
somebody does, and a look at all tables after it.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from sqlalchemy import Connection, update

from farm import reconcile, submitting
from farm.catalog import Lane
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import (
    BadImage,
    EngineCrashed,
    EngineHung,
    EngineKilled,
    FarmError,
    InvalidPrompt,
    JobCancelled,
    JobGivenBack,
    OutOfMemory,
    RenderFailed,
    StorageUnavailable,
)
from farm.pictures import object_key
from farm.states import JobState
from farm.store import batches, jobs, owners, prune, reuse, schema, sessions
from farm.store import tables as t
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from farm.verdict import give_back, settle_failure
from tests.contract.state_model import LONG_AGO, MAX_FAILURES, MBatch, MSession
from tests.contract.state_stage import Fragile, Stage, Torn, action
from tests.contract.state_submits import CHUNK, ENGINES, MODELS, OWNERS, Submits

SETTINGS = Settings(max_failures=MAX_FAILURES, retry_delay_s=3600.0)
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
STEPS = int(os.environ.get("STATE_STEPS", "20000"))  # of the nightly form, on each database
ERRORS = (
    InvalidPrompt, RenderFailed, BadImage, OutOfMemory, OutOfMemory, StorageUnavailable,
    EngineCrashed, EngineHung, EngineKilled, JobCancelled, JobGivenBack, JobGivenBack,
)  # fmt: skip

picks = st.lists(st.integers(0, 30), min_size=1, max_size=4)
tears = st.sampled_from((*[None] * 12, 0, 1, 3, 6, "answer"))
mostly_not = st.sampled_from((False, False, True))
whose = st.sampled_from(("hold", "hold", "rival", "any"))


def has_batches(stage: Stage) -> bool:
    return bool(stage.model.batches)


def has_claims(stage: Stage) -> bool:
    return bool(stage.claims)


def has_work(stage: Stage) -> bool:
    """Work that somebody may take the joy out of."""
    return len(stage.model.handed_out()) > 1


def ended_badly(batch: MBatch) -> bool:
    return any(job.state in ("failed", "cancelled") for job in batch.jobs.values())


def is_done(batch: MBatch) -> bool:
    return batch.finished and not batch.open


def is_busy(stage: Stage) -> bool:
    return len(stage.model.at_work()) > 2


class Attack(Submits):
    """What workers, persons and the farm itself do."""

    @action(
        1,
        when=lambda self: len(self.model.at_work()) < 4,
        model=st.sampled_from(MODELS),
        engine=st.sampled_from((*ENGINES, "fake")),
        memory=st.sampled_from((None, 100, 200, 300)),
    )
    def opens_a_session(self, model: str, engine: str, memory: int | None) -> None:
        lane = Lane(model, engine)
        session_id = self._do(
            lambda c: sessions.open_session(
                c, lane, 3600.0, host="h", pid=1, device="cpu", info={}, memory=memory
            )
        )
        assert session_id
        self.model.sessions[session_id] = MSession(session_id, lane, memory)

    @initialize()
    def begins(self) -> None:
        self.opens_a_session("shapes", "fake", 100)
        self.opens_a_session("shapes", "fake", None)
        self.submits([("shapes", None, 64, seed % 3) for seed in range(6)])

    def _claimant(self, n: int, any_: bool) -> MSession:
        """One for whom there is work, if there is one, unless anyone will do."""
        able = [one for one in self.model.sessions.values() if self.model.has_work_for(one)]
        return self._session(n) if any_ or not able else able[-1 - n % len(able)]

    @action(
        3,
        when=has_batches,
        n=st.integers(0, 5),
        limit=st.integers(1, 6),
        tear=tears,
        any_=mostly_not,
    )
    def claims_a_bundle(self, n: int, limit: int, tear: int | str | None, any_: bool) -> None:
        session = self._claimant(n, any_)
        got: list[list[Claim]] = []
        real = jobs.claim

        def spy(*args: Any, **named: Any) -> list[Claim]:
            got.append(real(*args, **named))
            return got[-1]

        self.db.tear = tear
        jobs.claim = spy  # the answer that the worker does not get
        try:
            answer = claim_bundle(self.db, session.id, session.lane, limit)
        except Torn:
            answer = []
        finally:
            jobs.claim, self.db.tear = real, None
        if not isinstance(tear, int):
            bundle = next((some for some in got if some), [])
            assert answer == ([] if tear else bundle)
            self.model.claim(session.id, limit, bundle)
        self.claims += answer
        self.seen["claimed"] += len(answer)

    @action(6, when=has_batches, n=st.integers(0, 5), limit=st.integers(1, 6))
    def claims_for_good(self, n: int, limit: int) -> None:
        self.claims_a_bundle(n, limit, None, False)

    @action(3, when=has_claims, numbers=picks, tear=tears, done=st.floats(0, 1), whose=whose)
    def starts(self, numbers: list[int], tear: int | str | None, done: float, whose: str) -> None:
        some = self._some(numbers, whose)

        def mark(connection: Connection) -> bool:
            jobs.mark_started(connection, some)
            jobs.record_progress(connection, [(claim, done) for claim in some])
            return True

        if self._do(mark, tear):
            self.model.start(some)

    def _picture(self, claim: Claim) -> Picture:
        """Its object is stored under a key of this very claim."""
        key = object_key(claim.ref, claim.claim_no, claim.session_id, "png")
        self.model.stored.add(key)
        return Picture(key, "0" * 64, 10, 0.5, claim.spec.fingerprint("fake", "0" * 64))

    @action(4, when=has_claims, numbers=picks, tear=tears, locks=st.booleans(), whose=whose)
    def records_pictures(
        self, numbers: list[int], tear: int | str | None, locks: bool, whose: str
    ) -> None:
        done = [(claim, self._picture(claim)) for claim in self._some(numbers, whose)]

        def record(connection: Connection) -> set[Any]:
            if locks:
                jobs.lock(connection, [claim for claim, _ in done])
            return jobs.succeed(connection, done)

        moved = self._do(record, tear)
        if moved is not None:
            keys = {claim: picture.object_key for claim, picture in done}
            assert moved == self.model.succeed(keys)
            self.seen["recorded"] += len(moved)
            if tear == "answer":  # asked again, as a recorder does
                assert self._do(record) == moved

    @action(
        4,
        when=has_claims,
        n=st.integers(0, 30),
        error=st.sampled_from(ERRORS),
        tear=tears,
        whose=whose,
    )
    def reports_a_failure(
        self, n: int, error: type[FarmError], tear: int | str | None, whose: str
    ) -> None:
        (claim,) = self._some([n], whose)

        def settle(connection: Connection) -> bool:
            if error is JobGivenBack:
                return give_back(connection, claim, "a test")
            return settle_failure(connection, claim, error(), SETTINGS)

        moved = self._do(settle, tear)
        if moved is not None:
            assert moved == self.model.settle(claim, error())
            self.seen["failures"] += moved

    @action(3, when=has_claims, numbers=picks, tear=tears, whose=whose)
    def links_to_pictures_that_are_there(
        self, numbers: list[int], tear: int | str | None, whose: str
    ) -> None:
        some = self._some(numbers, whose)
        marks = {claim: claim.spec.fingerprint("fake", "0" * 64) for claim in some}
        batch_id = some[0].ref.batch_id
        with self.db.read() as connection:
            found = reuse.rendered(connection, batch_id, list(set(marks.values())))
        there = {job.fingerprint for job in self.model.jobs if job.state == "succeeded"}
        batch = self.model.batches.get(batch_id)
        wants = batch is not None and batch.reuse
        assert set(found) == (there & set(marks.values()) if wants else set())
        sources = {claim: found[mark] for claim, mark in marks.items() if mark in found}
        if not sources:
            return
        keys = {claim: self._source_key(ref) for claim, ref in sources.items()}
        gone = self._do(lambda c: reuse.link(c, sources), tear)
        if gone is not None:
            assert gone == set()
            self.seen["linked"] += sum(self.model.holds(claim) for claim in keys)
            self.model.succeed(keys)

    def _source_key(self, ref: JobRef) -> str:
        job = self.model.job(ref)
        assert job
        assert job.object_key
        return job.object_key

    @action(n=st.integers(0, 5), state=st.sampled_from(t.SESSION_STATES))
    def beats(self, n: int, state: str) -> None:
        session = self._session(n)
        lives = self._do(lambda c: sessions.beat(c, session.id, 3600.0, sessions.Beat(state)))
        assert lives is not session.closed
        if lives:
            session.expired, session.state = False, state

    @action(when=is_busy, n=st.integers(0, 5))
    def falls_silent(self, n: int) -> None:
        session = self._session(n)
        mine = t.sessions.c.id == session.id
        self._do(lambda c: c.execute(update(t.sessions).where(mine).values(expires_at=1.0)))
        session.expired = True

    @action(when=is_busy, n=st.integers(0, 5))
    def ends_in_order(self, n: int) -> None:
        session = self._session(n)
        self._do(lambda c: sessions.close(c, session.id))
        session.closed = True

    # ---- persons

    @action(
        2,
        when=has_work,
        n=st.integers(0, 5),
        idx=st.sampled_from((None, 0, 1, 2, 3, 4)),
        tear=tears,
    )
    def cancels(self, n: int, idx: int | None, tear: int | str | None) -> None:
        batch = self._batch(n)

        def cancel(connection: Connection) -> tuple[int, int]:
            if idx is None:
                batches.set_cancelled(connection, batch.id)
            return jobs.request_cancel(connection, batch.id, idx)

        answer = self._do(cancel, tear)
        if answer is not None:
            batch.cancelled = batch.cancelled or (idx is None and not batch.finished)
            assert answer[0] == self.model.cancel(batch.id, idx, JobCancelled.code)

    @action(1, when=has_batches, n=st.integers(0, 5), paused=mostly_not)
    def pauses(self, n: int, paused: bool) -> None:
        batch = self._batch(n)
        self._do(lambda c: batches.set_paused(c, batch.id, paused))
        batch.paused = paused

    @action(
        3,
        when=has_batches,
        n=st.integers(0, 5),
        states=st.sampled_from((["failed"], *[["failed", "cancelled"]] * 3)),
        idx=st.sampled_from((None, None, None, 0, 1)),
        code=st.sampled_from(("", "", "", "ERR_INVALID_PROMPT", "ERR_CANCELLED")),
        tear=tears,
    )
    def drives_anew(
        self, n: int, states: list[str], idx: int | None, code: str, tear: int | str | None
    ) -> None:
        batch = self._batch(n, ended_badly)
        wanted = [JobState(state) for state in states]
        moved = self._do(
            lambda c: jobs.redrive(c, batch.id, wanted, idx=idx, code=code or None), tear
        )
        if moved is not None:
            assert moved == self.model.redrive(batch.id, states, idx, code)
            self.seen["driven anew"] += moved

    @action(
        owner=st.sampled_from((*OWNERS, "*")),
        queued=st.sampled_from((None, None, None, 8)),
        running=st.sampled_from((None, 0, 1, 3)),
        ends=st.sampled_from((True, True, False)),
    )
    def limits_an_owner(
        self, owner: str, queued: int | None, running: int | None, ends: bool
    ) -> None:
        limits = None if ends else owners.Limits(queued, running)
        self._do(lambda c: owners.set_limits(c, owner, limits))
        if limits is None:
            self.model.max_queued.pop(owner, None)
            self.model.max_running.pop(owner, None)
        else:
            self.model.max_queued[owner], self.model.max_running[owner] = queued, running

    # ---- time, and what the farm does by itself

    @action(
        2,
    )
    def time_passes(self) -> None:
        held_back = t.jobs.c.not_before.is_not(None)
        self._do(lambda c: c.execute(update(t.jobs).where(held_back).values(not_before=1.0)))
        for job in self.model.jobs:
            job.not_before = LONG_AGO if job.not_before else None

    @action(when=has_work, n=st.integers(0, 5))
    def a_deadline_passes(self, n: int) -> None:
        batch = self._batch(n)
        mine = t.batches.c.id == batch.id
        self._do(lambda c: c.execute(update(t.batches).where(mine).values(expires_at=1.0)))
        batch.expired = True

    @action()
    def ends_what_nobody_wants(self) -> None:
        reconcile.end_stopped(self.db)
        self.model.end_stopped()

    @action(2, lenient=st.booleans())
    def reconciles(self, lenient: bool) -> None:
        reconcile.reconcile(self.db, SETTINGS, lenient=lenient)
        self.model.reconcile(lenient=lenient)

    @action(2, when=has_batches, n=st.integers(0, 5), limit=st.integers(1, 5), tear=tears)
    def prunes(self, n: int, limit: int, tear: int | str | None) -> None:
        batch = self._batch(n, is_done)
        step = self._do(lambda c: prune.step(c, batch.id, limit), tear)
        if step is not None:
            assert (step.jobs, step.ended, step.kept) == self.model.prune(batch.id, limit)
            self.seen["pruned"] += step.jobs

    @action()
    def deletes_dropped_objects(self) -> None:
        with self.db.read() as connection:
            keys = set(prune.dropped(connection, 1000))
        self.model.stored -= keys
        self._do(lambda c: prune.settle_dropped(c, keys))
        self.model.dropped -= keys


def test_no_sequence_of_steps_breaks_the_store(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitting, "CHUNK", CHUNK)
    monkeypatch.setattr(submitting, "FIRST_CHUNK", 1)
    monkeypatch.setattr(t, "AVOID_S", 86_400.0)  # an example may take long
    monkeypatch.setattr(sessions, "AWAY_S", 86_400.0)
    machine = type("Attack", (Attack,), {"db": Fragile(database_url), "seen": Counter()})
    schema.upgrade(machine.db)
    about = settings(
        max_examples=50 if NIGHTLY else 8,
        stateful_step_count=100 if NIGHTLY else 40,
        derandomize=not NIGHTLY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=about)
        while NIGHTLY and machine.steps < STEPS:
            run_state_machine_as_test(machine, settings=about)
        assert machine.steps > 200
    finally:
        machine.db.close()
        with capsys.disabled():
            what = ", ".join(f"{n:,} {name}" for name, n in sorted(machine.seen.items()))
            print(f"\n{machine.db.dialect}: {machine.steps:,} steps; {what}")
