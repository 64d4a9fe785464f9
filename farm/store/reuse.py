"""Pictures that are there already: a job of the same fingerprint is given the picture of another.

Whoever links locks the row that it links to, and pruning locks the rows that it removes: a picture
is removed only when no row names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, String, cast, select

from farm.states import JobState
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture, lock, succeed
from farm.store.rows import rows
from farm.store.tables import batches, is_state, jobs


def rendered(
    connection: Connection, batch_id: str, fingerprints: Sequence[str]
) -> dict[str, JobRef]:
    """A succeeded job of each fingerprint that has one; none for a batch that wants no reuse.

    One look at an index for each fingerprint, however often its picture was linked.
    """
    wanted = rows(connection, (jobs.c.fingerprint,), [(one,) for one in fingerprints])
    place = jobs.c.batch_id + "/" + cast(jobs.c.idx, String)
    known = (jobs.c.fingerprint == wanted.c.fingerprint, is_state(JobState.SUCCEEDED))
    source = select(place).where(*known).limit(1).correlate(wanted).scalar_subquery()
    wish = select(batches.c.id).where(batches.c.id == batch_id, batches.c.reuse).exists()
    found = connection.execute(select(wanted.c.fingerprint, source).where(wish))
    return {fingerprint: JobRef.parse(job) for fingerprint, job in found if job}


def known(connection: Connection, fingerprints: Sequence[str]) -> set[str]:
    """Those of which there is a picture, by one look at an index each."""
    wanted = rows(connection, (jobs.c.fingerprint,), [(one,) for one in fingerprints])
    made = (jobs.c.fingerprint == wanted.c.fingerprint, is_state(JobState.SUCCEEDED))
    there = select(jobs.c.idx).where(*made).limit(1).correlate(wanted).exists()
    return set(connection.scalars(select(wanted.c.fingerprint).where(there)))


def link(connection: Connection, sources: Mapping[Claim, JobRef]) -> set[JobRef]:
    """running -> succeeded, each with the picture of its source.

    Returns those whose source is gone meanwhile: they are still to be rendered. A claim that was
    lost changes nothing, as in `jobs.succeed`.
    """
    pictures = _pictures(connection, set(sources.values()))
    done = [(held, pictures[ref]) for held, ref in sources.items() if ref in pictures]
    lock(connection, [held for held, _ in done])
    succeed(connection, done)
    return {held.ref for held, ref in sources.items() if ref not in pictures}


def _pictures(connection: Connection, refs: set[JobRef]) -> dict[JobRef, Picture]:
    """The pictures of those that still have one, which keep it until this transaction ends."""
    by_batch: dict[str, list[int]] = {}
    for batch_id, idx in refs:
        by_batch.setdefault(batch_id, []).append(idx)
    names = ("object_key", "sha256", "size_bytes", "fingerprint")
    columns = (jobs.c.idx, *(jobs.c[name] for name in names))
    found: dict[JobRef, Picture] = {}
    for batch_id, idxs in sorted(by_batch.items()):
        mine = (jobs.c.batch_id == batch_id, jobs.c.idx.in_(idxs), is_state(JobState.SUCCEEDED))
        kept = select(*columns).where(*mine)
        kept = kept.with_for_update(read=True, key_share=True, skip_locked=True)
        for idx, key, sha256, size, fingerprint in connection.execute(kept):
            found[JobRef(batch_id, idx)] = Picture(key, sha256, size, None, fingerprint)
    return found
