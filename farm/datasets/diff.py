"""What one dataset has and another has not, row by row: by what was asked for, and by picture."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from farm.blobs import BlobStore
from farm.datasets.manifest import manifest_of, stats_of
from farm.datasets.seen import Seen, mark_of
from farm.errors import BlobDamaged

MOST_SHOWN = 1_000


@dataclass
class Diff:
    """`same` rows have the same job and picture in both, `changed` ones the same job and another
    picture. `added` and `removed` are jobs that the other one does not have; the numbers of the
    first thousand rows each are in `rows`.
    """

    same: int = 0
    changed: int = 0
    added: int = 0
    removed: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def note(self, what: str, row: int) -> None:
        setattr(self, what, getattr(self, what) + 1)
        if what in self.rows and len(self.rows[what]) < MOST_SHOWN:
            self.rows[what].append(row)


def diff(old: BlobStore, old_where: str, new: BlobStore, new_where: str) -> Diff:
    """From `old` to `new`. Raises NotFound, and BlobDamaged where stats were changed by hand.

    Some 100 bytes a row: jobs and pictures are told apart by 64 bits of their hashes.
    """
    places, rows, pictures, gone = Seen(), array("Q"), array("Q"), bytearray()
    for row, picture, job in _rows(old, old_where):
        places.add(job, len(rows))
        rows.append(row)
        pictures.append(picture)
        gone.append(True)
    found = Diff(rows={"changed": [], "added": [], "removed": []})
    for row, picture, job in _rows(new, new_where):
        was = places.get(job)
        if was is None:
            found.note("added", row)
        else:
            gone[was] = False
            found.note("same" if pictures[was] == picture else "changed", row)
    for row, is_gone in zip(rows, gone, strict=True):
        if is_gone:
            found.note("removed", row)
    return found


def _rows(place: BlobStore, where: str) -> Iterator[tuple[int, int, int]]:
    """(row, its picture, what was asked for, for the how manieth time) of each row, as marks."""
    seen = Seen()
    for shard, stats in stats_of(place, manifest_of(place, where)):
        if stats is None:
            raise BlobDamaged(f"{where}: {shard.stats.key} is not what was written")
        for row, sha256, job in stats["pictures"]:
            nth = seen.count(mark_of(job))
            yield row, int(sha256[:16], 16), mark_of(f"{job} {nth}")
