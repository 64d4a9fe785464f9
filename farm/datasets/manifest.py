"""A dataset as it lies in its place: the manifest, what it names, and whether all of it is there.

manifest.json, written last, names the loose files and each shard's stats file with their SHA-256;
a stats file names the shard's files with theirs. So one hash stands for everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from farm import faults
from farm.blobs import BlobStore
from farm.datasets.seen import Seen, mark_of
from farm.datasets.stats import MANIFEST, OWN, Count, File, Stats, hash_of, read_json, read_stats
from farm.errors import BlobDamaged, NotFound

_THREADS = 4
_AT_ONCE = 64  # files; all are waited for before the next


class Shard(BaseModel):
    """`stats`: the file that tells of it. `files`: those of its files that are not pictures."""

    stats: File
    files: tuple[File, ...]


class Manifest(BaseModel):
    """What a run writes last. `files`: those that are of no shard."""

    name: str
    batch: str
    recipe_sha256: str = ""
    rows: Count
    counts: dict[str, Count]
    shards: tuple[Shard, ...]
    files: tuple[File, ...]


@dataclass
class Verdict:
    """What was found. `bytes` were read; `extra` files belong to no shard."""

    name: str
    files: int = 0
    bytes: int = 0
    rows: int = 0
    shards: int = 0
    wrong: list[dict[str, str]] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": not self.wrong}


def manifest_of(place: BlobStore, where: str) -> Manifest:
    """Raises NotFound where no dataset lies, or one that is not finished, and BlobDamaged."""
    found = read_json(place, MANIFEST)
    if found is None:
        raise NotFound(f"{where} holds no dataset: there is no {MANIFEST}")
    if "shards" not in found:
        raise NotFound(
            f"the dataset in {where} is not finished; `farm dataset run` goes on with it"
        )
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        what = faults.sentence(first, MANIFEST)
        raise BlobDamaged(f"{where}: {MANIFEST} is none that a run writes: {what}") from None


def stats_of(place: BlobStore, manifest: Manifest) -> Iterator[tuple[Shard, Stats | None]]:
    """Each shard, with what its stats tell; None: they are not those that were written."""
    for shard in manifest.shards:
        whole = hash_of(place, shard.stats.key) == shard.stats.sha256
        yield shard, read_stats(place, shard.stats.key) if whole else None


def files_of(place: BlobStore, manifest: Manifest) -> Iterator[File]:
    """All files of a dataset but the manifest. Raises BlobDamaged for stats that are not whole."""
    yield from manifest.files
    for shard, stats in stats_of(place, manifest):
        if stats is None:
            fault = "not what was written" if place.stat(shard.stats.key) else "missing"
            raise BlobDamaged(f"{shard.stats.key} is {fault}")
        yield shard.stats
        yield from map(File.model_validate, stats["files"])


def verify(place: BlobStore, where: str) -> Verdict:
    """Read every file of a dataset and compare its hash. Raises NotFound where there is none, and
    BlobDamaged for a manifest that is none."""
    manifest = manifest_of(place, where)
    told = Verdict(manifest.name, rows=manifest.rows, shards=len(manifest.shards))
    known = Seen()
    known.add(mark_of(MANIFEST), 0)
    for file, found in _read(place, _named(place, manifest)):
        known.add(mark_of(file.key), 0)
        told.files, told.bytes = told.files + 1, told.bytes + file.size
        if found is None:
            told.wrong.append({"key": file.key, "fault": "is missing"})
        elif found != file.sha256:
            told.wrong.append({"key": file.key, "fault": "is not what was written"})
    for prefix in OWN:
        listed = (one.key for one in place.list(prefix))
        told.extra += [key for key in listed if known.get(mark_of(key)) is None]
    return told


def _named(place: BlobStore, manifest: Manifest) -> Iterator[File]:
    """All files but the manifest; of a shard whose stats are damaged, those the manifest names."""
    yield from manifest.files
    for shard, stats in stats_of(place, manifest):
        yield shard.stats
        yield from map(File.model_validate, stats["files"]) if stats else shard.files


def _read(place: BlobStore, files: Iterator[File]) -> Iterator[tuple[File, str | None]]:
    """Each with the SHA-256 of what lies there, or None."""
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(files, _AT_ONCE)):
            yield from zip(some, pool.map(lambda f: hash_of(place, f.key), some), strict=True)
