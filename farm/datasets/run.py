"""A run: the recipe's rows as one batch, then shard after shard, as their jobs are done.

Nothing of a run is kept in this process: killed at any moment, and started again anywhere with the
same recipe and label, it finds its batch by key, its shards by their content, and goes on. A row's
number is its place in the batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any

from farm.blobs import BlobStore
from farm.datasets import finish
from farm.datasets.alone import alone
from farm.datasets.batches import CHANGED, Batches, Tell, asked, patiently
from farm.datasets.gates import Gates
from farm.datasets.outcome import ACCEPTED, CANCELLED, FAILED, REJECTED, STATES, Outcome
from farm.datasets.place import open_place, take
from farm.datasets.recipe import Recipe
from farm.datasets.rows import Planned, planned
from farm.datasets.settle import Settler
from farm.datasets.shards import Shards
from farm.datasets.stats import Stats
from farm.errors import BlobDamaged, BlobNotFound, InvalidConfig, RowError
from farm.service import Farm
from farm.states import JobState
from farm.store.batches import BatchStatus
from farm.store.reads import Job
from farm.store.tables import clock

_THREADS = 4  # that look for lost pictures


@dataclass
class Summary:
    """What a run made. `bytes`: of the accepted pictures. `refused`: rejected rows by last gate.

    Of this process: `rendered`: pictures rendered since it began, `reused`: those that were there;
    `written`: shards that it wrote, `kept`: those that were complete; `seconds`.
    """

    name: str
    label: str
    batch: str
    out: str
    rows: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    refused: dict[str, int] = field(default_factory=dict)
    rendered: int = 0
    reused: int = 0
    shards: int = 0
    written: int = 0
    kept: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every row was rendered, be it accepted or not."""
        return not self.counts[FAILED] and not self.counts[CANCELLED]

    @property
    def ok(self) -> bool:
        """Whether it is whole, and not empty."""
        return self.whole and bool(self.counts[ACCEPTED])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"whole": self.whole, "ok": self.ok}

    def count(self, outcomes: Sequence[Outcome], since: float) -> None:
        """Add a shard's. `since`: when the process began, by the database's clock."""
        counts = Counter(one.state for one in outcomes)
        for state in STATES:
            self.counts[state] += counts[state]
        gates = Counter(one.tries[-1].gate for one in outcomes if one.state == REJECTED)
        self.refused = dict(sorted((gates + Counter(self.refused)).items()))
        tried = [job for one in outcomes for job in one.jobs]
        pictures = [job for job in tried if job.state == JobState.SUCCEEDED]
        fresh = (job for job in pictures if job.render_s is not None)
        new = len({job.id for job in fresh if (job.finished_at or 0) >= since})
        self.rendered, self.reused = self.rendered + new, self.reused + len(pictures) - new
        self.bytes += sum(one.job.size_bytes or 0 for one in outcomes if one.state == ACCEPTED)


def run(
    farm: Farm,
    recipe: Recipe,
    label: str = "",
    *,
    priority: int | None = None,
    redrive: bool = False,
    tell: Tell,
) -> Summary:
    """Render and write the dataset, or what is missing of it.

    `redrive`: jobs that failed or were cancelled are queued again first, and lost pictures that are
    needed are rendered anew. Outages of the database and the blob store are waited out. Raises
    InvalidPromptFile with the bad rows, InvalidConfig when another dataset lies in its place,
    StorageRefused, and BlobNotFound or BlobDamaged for a lost picture.
    """
    where = recipe.place(label)
    priority = recipe.priority if priority is None else priority
    batches = Batches(farm, recipe, label, priority, redrive, tell)
    with closing(open_place(where, farm.settings)) as place, alone(farm.db, where, tell) as check:
        return _Run(farm, recipe, label, place, batches, redrive, tell, check).run()


def day(at: float) -> str:
    """The date of a time in seconds since 1970, in UTC."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


class _RenderedAnew(Exception):
    """Lost pictures are there again, as other jobs'."""


class _Run:
    def __init__(
        self,
        farm: Farm,
        recipe: Recipe,
        label: str,
        place: BlobStore,
        batches: Batches,
        redrive: bool,
        tell: Tell,
        check: Callable[[], None],
    ) -> None:
        self._farm, self._recipe, self._label, self._place = farm, recipe, label, place
        self._batches, self._redrive, self._tell, self._check = batches, redrive, tell, check
        self._gates = Gates(recipe.gates, recipe.folder)
        self._shards = Shards(place, self._fetch, recipe, self._gates.mark)
        self._lost: dict[str, Job] = {}
        self._anew: set[str] = set()
        self._wrote: set[int] = set()

    def run(self) -> Summary:
        began, self._since = time.monotonic(), patiently(self._clock, self._tell)
        patiently(lambda: take(self._place, self._recipe.name), self._tell)
        while True:
            try:
                told = self._run()
                break
            except _RenderedAnew:  # gates judge each picture by those before it: from the start
                continue
        told.seconds = round(time.monotonic() - began, 3)
        return told

    def _run(self) -> Summary:
        self._settler = Settler(self._recipe, self._gates, self._batches, self._fetch, self._tell)
        batch = self._batches.main()
        size = self._recipe.shard_size
        told = Summary(self._recipe.name, self._label, batch.id, self._recipe.place(self._label))
        told.rows, told.shards = batch.total, -(-batch.total // size)
        rows = planned(self._recipe, self._label)
        contents = finish.Contents()
        for shard in range(told.shards):
            stats = self._shard(told, shard, list(islice(rows, size)))
            contents.add(stats)
        if next(rows, None) is not None:
            raise InvalidConfig(CHANGED)
        self._batches.check()
        patiently(lambda: self._finish(batch, contents), self._tell)
        return told

    def _fetch(self, job: Job) -> bytes:
        try:
            return self._farm.fetch(job)
        except (BlobNotFound, BlobDamaged) as error:
            self._lost[asked(job)] = job
            raise type(error)(
                f"{error.message}; `farm dataset redrive` renders such pictures anew, `farm audit` "
                "finds all that there are"
            ) from error

    def _render_anew(self, jobs: Sequence[Job]) -> bool:
        """All lost pictures of a shard's jobs; False: nothing was lost but what was lost before."""

        def look(job: Job) -> None:
            with suppress(BlobNotFound, BlobDamaged):
                patiently(lambda: self._fetch(job), self._tell)

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="look") as pool:
            list(pool.map(look, (job for job in jobs if job.state == JobState.SUCCEEDED)))
        found = {what: job for what, job in self._lost.items() if what not in self._anew}
        if found:
            self._anew |= found.keys()
            self._tell.trouble(f"pictures are lost, {len(found):,} here; they are rendered anew")
            self._batches.render_anew(list(found.values()))
        return bool(found)

    def _clock(self) -> float:
        with self._farm.db.read() as connection:
            return clock(connection)

    def _finish(self, batch: BatchStatus, contents: finish.Contents) -> None:
        self._check()
        run = finish.Made(self._label, batch.id, day(batch.created_at))
        finish.finish(self._place, self._farm.catalog, self._recipe, contents, run)

    def _shard(self, told: Summary, shard: int, rows: Sequence[Planned | RowError]) -> Stats:
        good = [row for row in rows if isinstance(row, Planned)]
        first = shard * self._recipe.shard_size
        if len(good) != min(self._recipe.shard_size, told.rows - first):
            raise InvalidConfig(CHANGED)
        self._batches.wait(told.batch, first, first + len(good))
        jobs = self._batches.jobs(told.batch, first, [row.fields["seed"] for row in good])
        try:
            return self._written(told, shard, good, jobs)
        except (BlobNotFound, BlobDamaged):
            if self._redrive and self._render_anew(jobs):
                raise _RenderedAnew from None
            raise

    def _written(
        self, told: Summary, shard: int, rows: Sequence[Planned], jobs: Sequence[Job]
    ) -> Stats:
        former = patiently(lambda: self._shards.stats(shard), self._tell)
        first = shard * self._recipe.shard_size
        outcomes, measures = self._settler.settle(first, rows, jobs, former)
        self._check()
        complete = partial(self._shards.complete, former, outcomes, measures)
        kept = patiently(complete, self._tell)
        stats = kept or patiently(lambda: self._shards.write(shard, outcomes, measures), self._tell)
        if not kept:
            self._wrote.add(shard)
        told.written += shard in self._wrote
        told.kept += shard not in self._wrote
        told.count(outcomes, self._since)
        self._tell.shard(shard, told.shards, not kept)
        return stats
