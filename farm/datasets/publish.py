"""A finished dataset copied to another place, each file checked on its way, the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from farm.blobs import BlobStore
from farm.datasets.manifest import files_of, manifest_of
from farm.datasets.place import content_type, remove, take
from farm.datasets.seen import Seen, mark_of
from farm.datasets.stats import MANIFEST, File, hash_of
from farm.errors import BlobDamaged

Done = Callable[[File, bool], None]  # a file, and whether it was copied


def publish(source: BlobStore, where: str, target: BlobStore, done: Done) -> None:
    """Copy it; what lies there already, to the byte, stays, so that it can be gone on with.

    Of an earlier version of the dataset, what is not in this one is removed at the end. Raises
    NotFound where there is no finished dataset, BlobDamaged for a file that is not what was
    written, and InvalidConfig for a target where something else lies.
    """
    manifest = manifest_of(source, where)
    take(target, manifest.name)
    known = Seen()
    for file in files_of(source, manifest):
        known.add(mark_of(file.key), 0)
        there = target.stat(file.key)
        copied = not (
            there and there.size == file.size and hash_of(target, file.key) == file.sha256
        )
        if copied:
            _copy(source, file, target)
        done(file, copied)
    remove(target, lambda key: known.get(mark_of(key)) is None)
    target.put(MANIFEST, source.get(MANIFEST), content_type(MANIFEST))


def fetch(source: BlobStore, file: File, path: Path) -> None:
    """One file of a dataset to `path`. Raises BlobDamaged when it is not what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for chunk in source.chunks(file.key):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != file.sha256:
        raise BlobDamaged(
            f"{file.key} is not what was written; `farm dataset verify` tells all such files, "
            "and `farm dataset run` writes them anew"
        )


def _copy(source: BlobStore, file: File, target: BlobStore) -> None:
    with target.aside() as folder:
        path = folder / "file"
        fetch(source, file, path)
        target.put_files([(file.key, path, content_type(file.key))])
