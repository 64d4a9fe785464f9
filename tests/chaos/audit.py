"""Whether a farm's record is true: after whatever happened, nothing lost and nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import func, select

from farm.blobs import BlobStat, BlobStore
from farm.catalog import Lane
from farm.errors import FarmError
from farm.retention import prune_orphans
from farm.service import Farm
from farm.store.reads import Job
from farm.store.tables import STATES, counts, events, jobs

AGED_S = 7200.0


@dataclass
class Audit:
    """`wrong` is empty if all is well; the rest are figures."""

    wrong: list[str] = field(default_factory=list)
    succeeded: int = 0
    witnessed: int = 0  # records seen as succeeded during the run, compared at the end
    given_back: Counter[str] = field(default_factory=Counter)  # events, by what they say
    claims: int = 0
    orphans: int = 0
    tokens: int = 0

    def lines(self) -> list[str]:
        lines = [
            f"  succeeded, each with its object and hash: {self.succeeded}; claims: {self.claims}",
            f"  records seen during the run that never changed: {self.witnessed}",
            f"  objects without a row, removed by prune: {self.orphans}; "
            f"tokens left in Redis: {self.tokens}",
            "  jobs that went back, by reason:",
        ]
        lines += [f"    {n:>5}  {why}" for why, n in self.given_back.most_common()]
        return lines + [f"  WRONG: {what}" for what in self.wrong]


class Aged:
    """A blob store whose objects look older than they are: prune spares what is young."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def list(self, prefix: str = "") -> Iterator[BlobStat]:
        for blob in self._blobs.list(prefix):
            yield replace(blob, modified=blob.modified - AGED_S)


def audit(farm: Farm, batches: Iterable[str], witnessed: dict[str, Job], lane: Lane) -> Audit:
    """Look at every job, object, counter and token of these batches. No worker may run."""
    told = Audit(witnessed=len(witnessed), tokens=farm.broker.length(lane))
    keys: Counter[str] = Counter()
    for batch_id in (ids := list(batches)):
        found = list(farm.jobs(batch_id))
        _check_places(told, farm, batch_id, found)
        for job in found:
            _check(told, farm, job, witnessed.get(job.id))
            keys.update(filter(None, [job.object_key]))
    told.wrong += [f"{n} jobs name the object {key}" for key, n in keys.items() if n > 1]
    _check_counters(told, farm)
    _count_events(told, farm)
    _check_orphans(told, farm, ids, set(keys))
    return told


def _check_places(told: Audit, farm: Farm, batch_id: str, found: list[Job]) -> None:
    total = farm.status(batch_id).total
    if [job.idx for job in found] != list(range(total)):
        told.wrong.append(f"batch {batch_id} of {total} jobs has other places than these")


def _check(told: Audit, farm: Farm, job: Job, before: Job | None) -> None:
    told.claims += job.claim_no
    if job.state != "succeeded":
        told.wrong.append(f"job {job.id} is {job.state}: {job.error_code} {job.error}")
        return
    told.succeeded += 1
    if before and before != job:
        told.wrong.append(f"the record of job {job.id} changed: {before} became {job}")
    try:
        farm.fetch(job)
    except FarmError as error:
        told.wrong.append(f"job {job.id}: {error.message}")


def _check_counters(told: Audit, farm: Farm) -> None:
    with farm.db.read() as connection:
        pool = (jobs.c.batch_id, jobs.c.model, jobs.c.asked_engine)
        counted: dict[tuple[Any, ...], dict[str, int]] = {}
        for *where, state, n in connection.execute(
            select(*pool, jobs.c.state, func.count()).group_by(*pool, jobs.c.state)
        ):
            counted.setdefault(tuple(where), {})[state] = n
        for row in connection.execute(select(counts)):
            truth = counted.pop((row.batch_id, row.model, row.asked_engine), {})
            kept = {str(state): getattr(row, state) for state in STATES if getattr(row, state)}
            if kept != truth:
                told.wrong.append(f"counters of {row.batch_id} say {kept}, the jobs {truth}")
        told.wrong += [f"{where} has no counters" for where in counted]
        held = connection.scalar(select(func.count()).where(jobs.c.session_id.is_not(None)))
        if held:
            told.wrong.append(f"{held} jobs are held by a session")


def _count_events(told: Audit, farm: Farm) -> None:
    with farm.db.read() as connection:
        told_of = select(events.c.kind, events.c.code, events.c.message)
        for kind, code, message in connection.execute(told_of):
            why = (message or "").split(";")[0][:60] if code == "ERR_GIVEN_BACK" else ""
            told.given_back[" ".join(filter(None, (kind, code, why)))] += 1


def _check_orphans(told: Audit, farm: Farm, batches: list[str], keys: set[str]) -> None:
    told.orphans = prune_orphans(farm.db, Aged(farm.blobs), older_than_s=AGED_S / 2).objects
    left = {blob.key for id in batches for blob in farm.blobs.list(f"pictures/{id}/")}
    if left != keys:
        told.wrong.append(
            f"after prune {len(left - keys)} objects have no row, {len(keys - left)} rows no object"
        )
