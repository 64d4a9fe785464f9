"""Proves the record: every picture is there as it was recorded, and nothing is counted wrongly.

Reads only, in bounded memory, beside a farm that runs: what changes meanwhile is looked at again
before it is called wrong. `farm reconcile` mends what can be mended; each finding says how.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from farm.blobs import BlobStat, BlobStore
from farm.errors import BlobNotFound
from farm.pictures import sha256
from farm.retention import SAFE_S, chunks, unnamed
from farm.store import audit as store
from farm.store import counters, prune
from farm.store.audit import Recorded
from farm.store.db import Database
from farm.store.ids import JobRef, claim_in

THREADS = 8
PAGE = 1_000  # jobs that are looked at in one go
MOST_FINDINGS = 1_000  # told one by one; all are counted

Kind = Literal["missing", "damaged", "shared", "counters", "end", "held", "orphan"]
RECONCILE = "farm reconcile"
RENDER_AGAIN = "farm audit --lost FILE, then farm submit --file FILE --no-reuse"
MEND: dict[Kind, str] = {
    "missing": RENDER_AGAIN,
    "damaged": RENDER_AGAIN,
    "shared": RENDER_AGAIN,
    "counters": RECONCILE,
    "end": RECONCILE,
    "held": RECONCILE,
    "orphan": RECONCILE,
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: of which job, batch or object, and the command that mends it."""

    kind: Kind
    about: str
    text: str
    mend: str


@dataclass
class Audited:
    """What was looked at, and what was wrong. `bytes` were read and hashed.

    `wrong` counts every finding by its kind; `findings` has the first MOST_FINDINGS of them.
    `last`: the batch that was finished with last, behind which another audit can go on.
    """

    batches: int = 0
    pictures: int = 0
    objects: int = 0
    bytes: int = 0
    last: str = ""
    wrong: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.wrong

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "wrong": dict(self.wrong)}

    def find(self, kind: Kind, about: str, text: str, mend: str | None = None) -> None:
        self.wrong[kind] += 1
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Finding(kind, about, text, mend or MEND[kind]))


Progress = Callable[[Audited], None]


def _silent(_: object) -> None:
    pass


def audit(
    db: Database,
    blobs: BlobStore,
    batch_ids: Iterable[str] | None = None,
    *,
    quick: bool = False,
    after: str = "",
    progress: Progress = _silent,
    lost: Callable[[JobRef], None] = _silent,
) -> Audited:
    """Look at these batches, or at all behind the id `after` and at every object of the store.

    Each succeeded job's object is read and compared with the recorded size and SHA-256; `quick`
    asks for its size only. `lost` hears of each job whose picture is to be rendered again: no arrow
    leads out of `succeeded`, so that is another job's task. Raises DatabaseUnavailable and
    StorageUnavailable.
    """
    told, look = Audited(), partial(_look, blobs, quick=quick)
    batch_ids = None if batch_ids is None else list(batch_ids)
    chosen = store.every_batch(db, after) if batch_ids is None else batch_ids
    with ThreadPoolExecutor(THREADS, thread_name_prefix="audit") as pool:
        for batch_id in chosen:
            _check_batch(told, db, batch_id)
            for page in _pages(db, batch_id):
                for ref in _check_pictures(told, db, pool, page, look):
                    lost(ref)
                progress(told)
            if batch_ids is not None:
                _check_objects(told, db, blobs, f"pictures/{batch_id}/", progress)
            told.batches += 1
            told.last = batch_id
    if batch_ids is None:
        for prefix in ("pictures/", "inputs/"):
            _check_objects(told, db, blobs, prefix, progress)
    _check_holders(told, db, None if batch_ids is None else set(batch_ids))
    return told


def _pages(db: Database, batch_id: str) -> Iterator[list[Recorded]]:
    after = -1
    while True:
        with db.read() as connection:
            page = store.recorded(connection, batch_id, after, PAGE)
        if page:
            yield page
            after = page[-1].ref.idx
        if len(page) < PAGE:
            return


def _check_batch(told: Audited, db: Database, batch_id: str) -> None:
    with db.read() as connection:
        for drift in counters.drift(connection, batch_id):
            told.find("counters", batch_id, f"the counters of batch {batch_id} are wrong: {drift}")
        if counters.wrong_ends(connection, batch_id):
            told.find("end", batch_id, f"the time of end of batch {batch_id} does not fit its jobs")


def _check_pictures(
    told: Audited,
    db: Database,
    pool: ThreadPoolExecutor,
    page: Sequence[Recorded],
    look: Callable[[Recorded], tuple[int, tuple[Kind, str] | None]],
) -> list[JobRef]:
    """The jobs of the page whose pictures are not what was recorded."""
    lost = []
    for one, (size, wrong) in zip(page, pool.map(look, page), strict=True):
        told.pictures += 1
        told.bytes += size
        if wrong:
            with db.read() as connection:
                there = store.still(connection, one)
            if there:  # and was not pruned just now
                told.find(wrong[0], str(one.ref), f"job {one.ref}: {wrong[1]}")
                lost.append(one.ref)
    return lost


def _look(blobs: BlobStore, one: Recorded, *, quick: bool) -> tuple[int, tuple[Kind, str] | None]:
    """(bytes that were read, what is wrong with the picture)."""
    key, claim = one.object_key, claim_in(one.object_key)
    if not one.linked and (claim is None or claim.ref != one.ref):
        return 0, ("shared", f"its picture {key} is that of another job, and it is no link")
    if quick:
        stat = blobs.stat(key)
        if stat is None:
            return 0, ("missing", f"its picture {key} is not there")
        if one.size_bytes not in (None, stat.size):
            return 0, ("damaged", f"{key} has {stat.size} bytes, not {one.size_bytes}")
        return 0, None
    try:
        data = blobs.get(key)
    except BlobNotFound:
        return 0, ("missing", f"its picture {key} is not there")
    if one.size_bytes not in (None, len(data)):
        return len(data), ("damaged", f"{key} has {len(data)} bytes, not {one.size_bytes}")
    if sha256(data) != one.sha256:
        return len(data), ("damaged", f"{key} is not what was recorded: its SHA-256 differs")
    return len(data), None


def _check_objects(
    told: Audited, db: Database, blobs: BlobStore, prefix: str, progress: Progress
) -> None:
    """Objects that nothing names: those of claims that are over, and old ones of nobody."""
    for some in chunks(blobs.list(prefix)):
        told.objects += len(some)
        passed, old = _orphans(db, blobs, some)
        for key in passed:
            told.find("orphan", key, f"no job names the object {key}, whose claim is over")
        for key in old:
            what = f"nothing here names the object {key}"
            told.find("orphan", key, what, "farm prune --orphans")
        progress(told)


def _orphans(
    db: Database, blobs: BlobStore, some: Sequence[BlobStat]
) -> tuple[list[str], list[str]]:
    """(pictures of claims that are over, other objects without a name that are a day old).

    Without those that a prune is about to delete, or has deleted since they were listed.
    """
    keys = [one.key for one in some]
    with db.read() as connection:
        passed = prune.passed_pictures(connection, keys)
    nameless = set(unnamed(db, keys)) - passed
    oldest = time.time() - SAFE_S
    old = [one.key for one in some if one.key in nameless and one.modified < oldest]
    with db.read() as connection:
        going = prune.dropped_among(connection, [*passed, *old])

    def left(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in going and blobs.stat(key)]

    return left(sorted(passed)), left(old)


def _check_holders(told: Audited, db: Database, batch_ids: set[str] | None) -> None:
    with db.read() as connection:
        held = store.held_by_the_dead(connection)
    for ref, session_id in held:
        if batch_ids is None or ref.batch_id in batch_ids:
            what = f"job {ref} is held by the session {session_id}, which does not live"
            told.find("held", str(ref), what)
