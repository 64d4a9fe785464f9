"""Where a dataset lies. Nothing that is not the dataset's own is written over or removed there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from farm.blobs import BlobStore, open_blobs
from farm.config import Settings
from farm.datasets.stats import LAYOUT, LOOSE, MANIFEST, OWN, json_bytes, read_json
from farm.errors import InvalidConfig
from farm.service import s3_options

_TYPES = {
    "json": "application/json",
    "md": "text/markdown",
    "toml": "application/toml",
    "tar": "application/x-tar",
    "parquet": "application/vnd.apache.parquet",
    "jsonl": "application/jsonl",
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
}


def content_type(key: str) -> str:
    """Of a dataset's file, by its ending."""
    return _TYPES.get(key.rpartition(".")[2], "application/octet-stream")


def open_place(where: str, settings: Settings) -> BlobStore:
    """The store at a directory or URL. Raises InvalidConfig, also where a file is in the way."""
    if not where:
        raise InvalidConfig("the place is empty; a dataset lies in a directory, or at an s3:// URL")
    place = open_blobs(where, s3=s3_options(settings))
    if "://" not in where:
        path = Path(where).absolute()
        there = next(one for one in (path, *path.parents) if os.path.lexists(one))
        if not there.is_dir():
            raise InvalidConfig(f"{where} is no place for a dataset: {there} is no directory")
    return place


def take(place: BlobStore, name: str) -> None:
    """Mark it as the place of the dataset `name`, if it is not.

    Raises InvalidConfig when another one lies there, or files of somebody else.
    """
    found = read_json(place, MANIFEST)
    if found is None:
        if key := _first(place):
            raise InvalidConfig(
                f"{key} lies in the place of the dataset, and no {MANIFEST} that says whose it is; "
                f"give {name!r} an empty place, or remove what is there"
            )
        place.put(MANIFEST, mark(name), content_type(MANIFEST))
    elif found.get("name") != name:
        raise InvalidConfig(
            f"a dataset named {str(found.get('name'))[:60]!r} lies there; give {name!r} a place of "
            "its own, or remove the other one"
        )


def mark(name: str) -> bytes:
    """The manifest of a dataset that is not finished: whose the place is."""
    return json_bytes({"layout": LAYOUT, "name": name})


def _first(place: BlobStore) -> str | None:
    """A key that a dataset would take and that something has taken."""
    for key in LOOSE:
        if place.stat(key):
            return key
    return next((one.key for prefix in OWN for one in place.list(prefix)), None)


def remove(place: BlobStore, gone: Callable[[str], bool]) -> None:
    """Delete the keys of the dataset's own that are `gone`."""
    for prefix in OWN:
        place.delete([one.key for one in place.list(prefix) if gone(one.key)])
