"""Whether a farm's record is true: after whatever happened, nothing lost and nothing twice.

The farm's own audit looks at objects, counters and holders; what it cannot know is looked at here:
that all jobs succeeded, that each has its own picture, and that no record ever changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import select

from farm.audit import audit as audit_farm
from farm.catalog import Lane
from farm.reconcile import mend_all
from farm.service import Farm
from farm.store.reads import Job
from farm.store.tables import events


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
            f"  objects without a row, removed by reconcile: {self.orphans}; "
            f"tokens left in Redis: {self.tokens}",
            "  jobs that went back, by reason:",
        ]
        lines += [f"    {n:>5}  {why}" for why, n in self.given_back.most_common()]
        return lines + [f"  WRONG: {what}" for what in self.wrong]


def audit(farm: Farm, batches: Iterable[str], witnessed: dict[str, Job], lane: Lane) -> Audit:
    """Look at every job, object, counter and token of these batches. No worker may run."""
    told = Audit(witnessed=len(witnessed), tokens=farm.broker.length(lane))
    keys: Counter[str] = Counter()
    for batch_id in (ids := list(batches)):
        found = list(farm.jobs(batch_id))
        _check_places(told, farm, batch_id, found)
        for job in found:
            _check(told, job, witnessed.get(job.id))
            keys.update(filter(None, [job.object_key]))
    told.wrong += [f"{n} jobs name the object {key}" for key, n in keys.items() if n > 1]
    _count_events(told, farm)
    _mend(told, farm)
    looked = audit_farm(farm.db, farm.blobs, ids)
    told.wrong += [finding.text for finding in looked.findings]
    if looked.objects > len(keys):  # a store that was killed may list fewer than it has
        told.wrong.append(f"{looked.objects} objects are left for {len(keys)} records")
    return told


def _mend(told: Audit, farm: Farm) -> None:
    """Kills may leave objects, and sessions without jobs; whatever else is mended was wrong."""
    report = mend_all(farm.db, lambda: farm.blobs, lambda: farm.broker, farm.settings)
    told.orphans = sum(repair.n for repair in report.repairs if repair.kind == "objects")
    told.wrong += [
        repair.text for repair in report.repairs if repair.kind != "objects" and repair.n
    ]
    told.wrong += report.troubles


def _check_places(told: Audit, farm: Farm, batch_id: str, found: list[Job]) -> None:
    total = farm.status(batch_id).total
    if [job.idx for job in found] != list(range(total)):
        told.wrong.append(f"batch {batch_id} of {total} jobs has other places than these")


def _check(told: Audit, job: Job, before: Job | None) -> None:
    told.claims += job.claim_no
    if job.state != "succeeded":
        told.wrong.append(f"job {job.id} is {job.state}: {job.error_code} {job.error}")
        return
    told.succeeded += 1
    if before and before != job:
        told.wrong.append(f"the record of job {job.id} changed: {before} became {job}")


def _count_events(told: Audit, farm: Farm) -> None:
    with farm.db.read() as connection:
        told_of = select(events.c.kind, events.c.code, events.c.message)
        for kind, code, message in connection.execute(told_of):
            why = (message or "").split(";")[0][:60] if code == "ERR_GIVEN_BACK" else ""
            told.given_back[" ".join(filter(None, (kind, code, why)))] += 1
