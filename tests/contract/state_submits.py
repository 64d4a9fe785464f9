"""Submits of the store's state machine: chunks, bad rows, streams that stop, keys, quotas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import select, update

from farm import reconcile
from farm.errors import (
    FarmError,
    InvalidPromptFile,
    KeyReused,
    QuotaExceeded,
    RowError,
    SubmitInProgress,
)
from farm.spec import NewJob
from farm.store import tables as t
from farm.store.batches import Once
from farm.store.ids import JobRef
from farm.submitting import Plan, submit
from tests.contract.state_model import MBatch, MJob
from tests.contract.state_stage import Stage, Torn, action
from tests.store_kit import spec

MODELS, ENGINES, OWNERS = ("shapes", "other"), ("fake", "sdcpp"), ("", "ann")
CHUNK = 3  # jobs of one transaction of a submit
MOST = 40  # jobs at once, so that a step stays cheap

one_job = st.tuples(
    st.sampled_from(("shapes", "shapes", *MODELS)),
    st.sampled_from((None, None, None, *ENGINES)),
    st.sampled_from((64, 64, 128)),  # width: two keys
    st.integers(0, 2),  # seed: few, so that pictures come twice
)
some_jobs = st.lists(one_job, min_size=1, max_size=7)


class Submits(Stage):
    """What those do who submit."""

    def _new(self, wanted: Sequence[tuple[Any, ...]]) -> list[NewJob]:
        return [
            NewJob.of(spec(model=model, engine=engine, width=width, seed=seed))
            for model, engine, width, seed in wanted
        ]

    def _note(self, batch_id: str, new: Sequence[NewJob], n: int) -> MBatch:
        """The first n jobs are in the batch."""
        batch = self.model.batches[batch_id]
        for idx, one in enumerate(new[:n]):
            ref = JobRef(batch_id, idx)
            about = (one.spec.model, one.spec.engine or "", one.shape.key)
            batch.jobs.setdefault(idx, MJob(ref, *about, one.spec.fingerprint("fake", "0" * 64)))
        return batch

    def _found(self) -> str | None:
        """The id of the batch that the model does not know yet."""
        with self.db.read() as connection:
            known = set(connection.scalars(select(t.batches.c.id)))
        new = known - set(self.model.batches)
        assert len(new) < 2
        return new.pop() if new else None

    @action(
        4,
        when=lambda self: len(list(self.model.jobs)) < MOST,
        wanted=some_jobs,
        owner=st.sampled_from(OWNERS),
        priority=st.integers(0, 1),
        eager=st.booleans(),
        reuse=st.sampled_from((True, True, False)),
        after=st.sampled_from((None, None, None, 0, 1, 5)),
        fate=st.sampled_from(("whole", "whole", "whole", "bad row", "stops")),
        at=st.integers(0, 7),
        key=st.one_of(st.none(), st.none(), st.sampled_from("abc")),
        early=st.booleans(),
    )
    def submits(
        self, wanted: Any, owner: str = "", priority: int = 0, eager: bool = False,
        reuse: bool = True, after: int | None = None, fate: str = "whole", at: int = 0,
        key: str | None = None, early: bool = False,
    ) -> None:  # fmt: skip
        former = self._batch(after).id if after is not None and self.model.batches else None
        new = self._new(wanted)
        at = min(at, len(new))

        def stream() -> Iterator[NewJob | RowError]:
            yield from new[:at]
            if fate == "bad row":
                yield RowError(1, "prompt", "", "a text")
            if fate == "stops":
                raise Torn
            yield from new[at:]

        once = Once(key, "0" * 64) if key else None
        plan = Plan(
            owner=owner, priority=priority, once=once, eager=eager, reuse=reuse, after=former,
            takeover_s=1000.0 if early else -1.0, expires_s=3600.0 if at == 3 else None,
        )  # fmt: skip
        before = self._made(owner, key)
        error: Exception | None = None
        try:
            submit(self.db, stream(), plan)
        except (Torn, FarmError) as caught:
            error = caught
        made = self._found()
        if before is None:
            if made is not None:
                self.model.batches[made] = MBatch(made, owner, priority, reuse, former, False)
                self.model.batches[made].ready = eager
                self.model.batches[made].whole = False
                if key:
                    self.keys[key + owner] = made
            self._after_submit(made, new, fate, at, eager, once is not None, error)
        else:
            self._after_again(before, new, fate, at, eager, early, error)

    def _made(self, owner: str, key: str | None) -> MBatch | None:
        """What the same key made before."""
        batch = self.model.batches.get(self.keys.get(f"{key}{owner}", ""))
        return batch if batch is None or batch.id not in self._keyless() else None

    def _keyless(self) -> set[str]:
        """Batches whose pruning has begun: their keys are free."""
        with self.db.read() as connection:
            query = select(t.batches.c.id).where(t.batches.c.idempotency_key.is_(None))
            return set(connection.scalars(query))

    def _after_submit(
        self, made: str | None, new: list[NewJob], fate: str, at: int, eager: bool, once: bool,
        error: Exception | None,
    ) -> None:  # fmt: skip
        n = len(new) if fate == "whole" or (eager and fate == "bad row") else at
        if isinstance(error, QuotaExceeded):
            n = self._within_quota(made, new, n)
        elif fate == "stops":
            assert isinstance(error, Torn)
            n = self._in_chunks(at, eager)
        removed = not eager and (
            isinstance(error, InvalidPromptFile | QuotaExceeded) or (fate == "stops" and not once)
        )
        if removed or not n:
            assert made is None, "nothing stays of a submit that failed"
            return
        assert made is not None, error
        self._note(made, new, n)
        if error is None or (eager and not (fate == "stops" and once)):
            self.model.release(made)

    def _in_chunks(self, at: int, eager: bool) -> int:
        """How many jobs of a stream that stops after `at` are in: whole chunks only."""
        first = 1 if eager and at else 0
        return first + (at - first) // CHUNK * CHUNK

    def _within_quota(self, made: str | None, new: list[NewJob], n: int) -> int:
        """How many were in when the quota was met, by the rows themselves."""
        with self.db.read() as connection:
            mine = t.jobs.c.batch_id == (made or "")
            return len(connection.execute(select(t.jobs.c.idx).where(mine)).all())

    def _after_again(
        self, batch: MBatch, new: list[NewJob], fate: str, at: int, eager: bool, early: bool,
        error: Exception | None,
    ) -> None:  # fmt: skip
        """A submit with a key that another used; it may go on with what that one began."""
        if not batch.whole and early:
            assert isinstance(error, SubmitInProgress)
            return
        with self.db.read() as connection:
            query = select(t.batches.c.total, t.batches.c.whole)
            status = connection.execute(query.where(t.batches.c.id == batch.id)).first()
        if status is None:  # refused, and gone with what was in
            assert isinstance(error, InvalidPromptFile | QuotaExceeded)
            self.model.remove(batch.id)
        else:
            assert status.total >= len(batch.jobs)
            if status.total > len(batch.jobs) or status.whole > batch.whole:
                assert not batch.whole, "a batch that was whole has grown"
                self._note(batch.id, new, status.total)
            if isinstance(error, KeyReused):
                assert status.total == len(batch.jobs)
            if status.whole and not batch.whole:
                self.model.release(batch.id)

    @action()
    def clears_away_what_was_half_submitted(self) -> None:
        with self.db.write() as connection:
            connection.execute(update(t.batches).values(touched_at=1.0))
        reconcile.remove_abandoned(self.db)
        for batch in [batch for batch in self.model.batches.values() if not batch.whole]:
            if batch.ready:
                self.model.release(batch.id)
            else:
                self.model.remove(batch.id)
