"""What becomes of a shard's rows: gates judge their pictures, and rejected rows are tried again.

Rounds go one after the other: first the rows' own pictures in the order of rows, then further
attempts at those that were rejected, in the same order, and so on. So the same pictures always lead
to the same decisions, whatever was judged when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from farm.datasets.batches import Batches, Tell, patiently
from farm.datasets.gates import Gates, Judge, Measures, Rejection
from farm.datasets.outcome import ACCEPTED, CANCELLED, FAILED, REJECTED, Outcome, Try
from farm.datasets.recipe import Recipe
from farm.datasets.rows import Planned
from farm.datasets.stats import Stats
from farm.errors import PictureBlocked
from farm.states import JobState
from farm.store.reads import Job

_THREADS = 2  # that measure pictures: Pillow and numpy let go of Python's lock
SAFETY = "safety"


class Settler:
    """Judges the shards of one run, in order. `read` gives a job's picture, checked."""

    def __init__(
        self,
        recipe: Recipe,
        gates: Gates,
        batches: Batches,
        read: Callable[[Job], bytes],
        tell: Tell,
    ) -> None:
        self._recipe, self._batches, self._read, self._tell = recipe, batches, read, tell
        self._gates, self._judge = gates, Judge(recipe.gates)

    def settle(
        self, first: int, rows: Sequence[Planned], jobs: Sequence[Job], former: Stats | None
    ) -> tuple[list[Outcome], dict[str, Measures]]:
        """An outcome for each row, and what was measured of each picture, by its SHA-256.

        `first`: number of the first row. `former`: stats of the shard as it was written before;
        pictures that were measured then are not measured again.
        """
        known: dict[str, Measures] = {}
        if former and former["gates"] == self._gates.mark:
            known = dict(former["measures"])
        found = [
            Outcome(n, "", [job], row.columns)
            for n, (row, job) in enumerate(zip(rows, jobs, strict=True), first)
        ]
        left: list[Outcome] = found
        used: dict[str, Measures] = {}
        for attempt in range(self._recipe.gates.attempts):
            if attempt:
                again = [(one.row, rows[one.row - first]) for one in left]
                for one, job in zip(left, self._batches.attempt(again, attempt), strict=True):
                    one.jobs.append(job)
            tried = [one.job for one in left]
            used |= patiently(partial(self._measured, tried, known), self._tell)
            left = [one for one in left if not self._is_settled(one, used)]
            if not left:
                break
        for one in left:
            one.state = REJECTED
        return found, used

    def _is_settled(self, one: Outcome, measures: dict[str, Measures]) -> bool:
        """Judge a row's present picture; False: it was rejected."""
        job = one.job
        if job.state == JobState.SUCCEEDED:
            assert job.sha256
            told = measures.get(job.sha256)
            rejected = self._judge.reason(told)
            if rejected is None:
                self._judge.accept(one.row, told)
                one.state = ACCEPTED
                return True
            self._note(one, rejected)
            return False
        if job.error_code == PictureBlocked.code and self._recipe.gates.safety == "reject":
            self._note(one, Rejection(SAFETY, job.error or ""))
            return False
        one.state = CANCELLED if job.state == JobState.CANCELLED else FAILED
        return True

    def _note(self, one: Outcome, why: Rejection) -> None:
        seed = int(one.job.spec["seed"])
        one.tries.append(Try(seed, why.gate, why.why, one.job.sha256))

    def _measured(self, jobs: Sequence[Job], known: dict[str, Measures]) -> dict[str, Measures]:
        """Measures of the pictures of these jobs, by SHA-256; they are added to the `known`."""
        if not self._gates.look:
            return {}
        pictures = {str(job.sha256): job for job in jobs if job.state == JobState.SUCCEEDED}
        new = [job for sha256, job in pictures.items() if sha256 not in known]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="measure") as pool:
            for job, told in zip(new, pool.map(self._measure, new), strict=True):
                known[str(job.sha256)] = told
        return {sha256: known[sha256] for sha256 in pictures}

    def _measure(self, job: Job) -> Measures:
        return self._gates.measure(self._read(job), job.spec)
