"""How long things are kept: old batches with their pictures, and objects that nothing names.

Rows go in short transactions, their objects right after them; what a kill leaves between the two is
noted in SQL and taken up by the next prune. A picture that other batches share goes with the last
of them. An input picture goes when no batch names it and it was not written of late: a submit that
is under way may count on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from farm.blobs import BlobStat, BlobStore
from farm.errors import Invalid, InvalidParameter
from farm.store import prune as store
from farm.store.db import Database

STEP = 1_000  # jobs in one transaction, and objects in one delete (S3's own limit)
SAFE_S = 86_400.0  # objects that nothing names are left alone for so long
LEAST_SAFE_S = 3_600.0
_INPUTS = "inputs/"


@dataclass
class Pruned:
    """What was taken away, or would be; `bytes` of the objects whose size is known.

    `kept`: batches that are not done, and were left as they are.
    """

    batches: int = 0
    jobs: int = 0
    objects: int = 0
    bytes: int = 0
    kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[Pruned], None]


def _silent(so_far: Pruned) -> None:
    pass


def old_batches(db: Database, older_than_s: float) -> list[str]:
    """The batches that ended longer ago than that, the oldest first."""
    with db.read() as connection:
        return store.finished(connection, older_than_s)


def prune(
    db: Database, blobs: BlobStore, batch_ids: Iterable[str], progress: Progress = _silent
) -> Pruned:
    """Remove batches that are done, and the objects that no other batch names.

    Can be stopped at any point and called again. Raises DatabaseUnavailable, StorageUnavailable.
    """
    told = Pruned()
    _sweep(db, blobs, told)
    for batch_id in batch_ids:
        step = store.Step()
        while not (step.ended or step.kept):
            with db.write() as connection:
                step = store.step(connection, batch_id, STEP)
            told.jobs += step.jobs
            _sweep(db, blobs, told)
            progress(told)
        told.batches += step.ended
        told.kept += step.kept
    return told


def would_prune(db: Database, batch_ids: Iterable[str], progress: Progress = _silent) -> Pruned:
    """What `prune` would remove; pictures that other batches share are counted too."""
    told = Pruned()
    for batch_id in batch_ids:
        with db.read() as connection:
            if not store.is_done(connection, batch_id):
                told.kept += 1
                continue
            size = store.size(connection, batch_id)
        told.batches += 1
        told.jobs += size.jobs
        told.objects += size.pictures
        told.bytes += size.bytes
        progress(told)
    return told


def prune_orphans(
    db: Database,
    blobs: BlobStore,
    *,
    older_than_s: float = SAFE_S,
    dry_run: bool = False,
    progress: Progress = _silent,
) -> Pruned:
    """Delete pictures and input pictures that nothing names, written `older_than_s` ago or more.

    Objects under other keys are left alone. Raises InvalidParameter for less than an hour, and
    Invalid when the database holds no batch at all, as the wrong one would.
    """
    if older_than_s < LEAST_SAFE_S:
        raise InvalidParameter("objects younger than an hour may be in use: give 1h or more")
    with db.read() as connection:
        if store.is_empty(connection):
            raise Invalid(
                f"{db.shown} holds no batch, so it would name every object an orphan; is it the "
                "database of this blob store?"
            )
    told, oldest = Pruned(), time.time() - older_than_s
    if not dry_run:
        _sweep(db, blobs, told)
    for prefix in ("pictures/", _INPUTS):
        for some in chunks(blobs.list(prefix)):
            sizes = {one.key: one.size for one in some if one.modified < oldest}
            orphans = unnamed(db, list(sizes))
            _delete(blobs, told, {key: sizes[key] for key in orphans}, dry_run=dry_run)
            progress(told)
    return told


def prune_passed(
    db: Database, blobs: BlobStore, *, dry_run: bool = False, progress: Progress = _silent
) -> Pruned:
    """Delete pictures that no job names nor will, since the claims they were made under are over.

    However young they are: no clock is asked. What belongs to no batch of this database is left
    alone, for it may be another farm's; `prune_orphans` takes it when a person says so.
    """
    told = Pruned()
    for some in chunks(blobs.list("pictures/")):
        sizes = {one.key: one.size for one in some}
        with db.read() as connection:
            passed = store.passed_pictures(connection, sizes)
        _delete(blobs, told, {key: sizes[key] for key in passed}, dry_run=dry_run)
        progress(told)
    return told


def _delete(blobs: BlobStore, told: Pruned, sizes: dict[str, int], *, dry_run: bool) -> None:
    """Delete these objects, given with their bytes, and count them."""
    if not dry_run:
        blobs.delete(sizes)
    told.objects += len(sizes)
    told.bytes += sum(sizes.values())


def sweep(db: Database, blobs: BlobStore, *, dry_run: bool = False) -> Pruned:
    """Delete the objects of rows that are gone already, as a prune that was killed left them."""
    told = Pruned()
    if dry_run:
        with db.read() as connection:
            told.objects, told.bytes = store.dropped_size(connection)
    else:
        _sweep(db, blobs, told)
    return told


def chunks(listing: Iterator[BlobStat]) -> Iterator[list[BlobStat]]:
    """The listing in lists of at most STEP objects."""
    while some := list(islice(listing, STEP)):
        yield some


def unnamed(db: Database, keys: list[str]) -> list[str]:
    """Those of the keys, all of pictures or all of inputs, that no job or batch names."""
    with db.read() as connection:
        if keys and keys[0].startswith(_INPUTS):
            named = store.named_inputs(connection, keys)
        else:
            named = store.named_pictures(connection, keys)
    return [key for key in keys if key not in named]


def _sweep(db: Database, blobs: BlobStore, told: Pruned) -> None:
    """Delete the objects whose rows are gone."""
    while True:
        with db.read() as connection:
            sizes = store.dropped(connection, STEP)
        if not sizes:
            return
        pictures = [key for key in sizes if not key.startswith(_INPUTS)]
        inputs = _old_inputs(db, blobs, [key for key in sizes if key.startswith(_INPUTS)])
        blobs.delete([*pictures, *inputs])
        with db.write() as connection:
            store.settle_dropped(connection, sizes)
        told.objects += len(pictures) + len(inputs)
        told.bytes += sum(sizes[key] or 0 for key in pictures) + sum(inputs.values())


def _old_inputs(db: Database, blobs: BlobStore, keys: list[str]) -> dict[str, int]:
    """Those that may go, with their bytes; the others are found as orphans later."""
    oldest = time.time() - SAFE_S
    found = (blobs.stat(key) for key in unnamed(db, keys))
    return {one.key: one.size for one in found if one and one.modified < oldest}
