"""What one dataset has and another has not, row by row: by what was asked for, and by picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from farm.blobs import BlobStore
from farm.datasets.manifest import manifest_of, stats_of
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
    """From `old` to `new`. Raises NotFound, and BlobDamaged where stats were changed by hand."""
    before: dict[tuple[str, int], tuple[int, str]] = {}
    for row, sha256, key in _rows(old, old_where):
        before[key] = (row, sha256)
    found = Diff(rows={"changed": [], "added": [], "removed": []})
    for row, sha256, key in _rows(new, new_where):
        was = before.pop(key, None)
        found.note("added" if was is None else "same" if was[1] == sha256 else "changed", row)
    for row, _ in before.values():
        found.note("removed", row)
    return found


def _rows(place: BlobStore, where: str) -> Any:
    """(row, the picture's SHA-256, (what was asked for, for the how manieth time)) of each row."""
    seen: Counter[str] = Counter()
    for shard, stats in stats_of(place, manifest_of(place, where)):
        if stats is None:
            raise BlobDamaged(f"{where}: {shard.stats.key} is not what was written")
        for row, sha256, mark in stats["pictures"]:
            yield row, sha256, (mark, seen[mark])
            seen[mark] += 1
