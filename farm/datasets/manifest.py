"""A dataset as it lies in its place: the manifest, what it names, and whether all of it is there.

manifest.json, written last, names the loose files and each shard's stats file with their SHA-256;
a stats file names the shard's files with theirs. So one hash stands for everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from farm.blobs import BlobStore
from farm.datasets.shards import Stats, hash_of, read_json
from farm.errors import NotFound

MANIFEST = "manifest.json"
OWN = ("webdataset/", "parquet/", "imagefolder/", "stats/")
"""Below these, what no manifest names is left over from an earlier run."""
_THREADS = 4


class File(NamedTuple):
    """A file that a manifest answers for; `sha256` None: it must be there, but nobody knows how."""

    key: str
    sha256: str | None
    size: int


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


def manifest_of(place: BlobStore, where: str) -> dict[str, Any]:
    """Raises NotFound where no dataset lies, or one that is not finished."""
    found: dict[str, Any] | None = read_json(place, MANIFEST)
    if found is None or "shards" not in found:
        raise NotFound(f"{where} holds no finished dataset: there is no {MANIFEST}")
    return found


def stats_of(place: BlobStore, manifest: dict[str, Any]) -> Iterator[tuple[File, Stats | None]]:
    """Each shard's stats file, with what it tells; None: it is not the one that was written."""
    for shard in manifest["shards"]:
        told = File(**shard["stats"])
        whole = hash_of(place, told.key) == told.sha256
        yield told, read_json(place, told.key) if whole else None


def files_of(place: BlobStore, manifest: dict[str, Any]) -> Iterator[File]:
    """All files of a dataset but the manifest; of shards whose stats are not whole, the stats."""
    for one in manifest["files"]:
        yield File(**one)
    for told, stats in stats_of(place, manifest):
        yield told
        for one in (stats or {}).get("files", ()):
            yield File(**one)


def verify(place: BlobStore, where: str) -> Verdict:
    """Read every file of a dataset and compare its hash. Raises NotFound where there is none."""
    manifest = manifest_of(place, where)
    told = Verdict(manifest["name"], rows=manifest["rows"], shards=len(manifest["shards"]))
    known = {MANIFEST}
    with ThreadPoolExecutor(_THREADS) as pool:
        files = list(files_of(place, manifest))
        for file, found in zip(
            files, pool.map(lambda f: hash_of(place, f.key), files), strict=True
        ):
            known.add(file.key)
            told.files, told.bytes = told.files + 1, told.bytes + file.size
            if found is None:
                told.wrong.append({"key": file.key, "fault": "is missing"})
            elif found != file.sha256:
                told.wrong.append({"key": file.key, "fault": "is not what was written"})
    for prefix in OWN:
        told.extra += [one.key for one in place.list(prefix) if one.key not in known]
    return told
