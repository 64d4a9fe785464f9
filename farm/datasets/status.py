"""How far a run is, by its batch, and by what lies in its place."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from farm.datasets.batches import batch_key
from farm.datasets.manifest import manifest_of
from farm.datasets.place import open_place
from farm.datasets.recipe import Recipe
from farm.errors import BlobDamaged, NotFound
from farm.service import Farm
from farm.store.batches import BatchStatus


@dataclass
class Status:
    """`batch`: None before the first run. `finished`: the dataset of this very batch and recipe is
    written.

    `stats`: shards that have been written, at least once. `counts`: what the dataset holds, once it
    was finished: of this run, or of the one before. `failures`: failed rows by error code.
    """

    name: str
    label: str
    out: str
    batch: BatchStatus | None
    finished: bool = False
    shards: int = 0
    stats: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"batch": self.batch and self.batch.as_dict()}


def status(farm: Farm, recipe: Recipe, label: str = "") -> Status:
    """Raises StorageUnavailable where the place cannot be read."""
    batch = farm.made_by(recipe.owner, batch_key(farm.catalog, recipe, label))
    told = Status(recipe.name, label, recipe.place(label), batch)
    if batch:
        told.shards = -(-batch.total // recipe.shard_size)
        told.failures = farm.failures(batch.id)
    with closing(open_place(told.out, farm.settings)) as place:
        told.stats = sum(1 for _ in place.list("stats/"))
        with suppress(NotFound, BlobDamaged):
            manifest = manifest_of(place, told.out)
            told.counts = manifest.counts
            told.finished = batch is not None and (manifest.batch, manifest.recipe_sha256) == (
                batch.id,
                recipe.public_sha256,
            )
    return told
