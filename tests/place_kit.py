"""Finished datasets of a few bytes, in a place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from farm.blobs import BlobStore, open_blobs
from farm.datasets.stats import json_bytes, stats_key

TYPE = "application/octet-stream"
Pictures = list[tuple[int, str, str]]


def sha(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def put(place: BlobStore, key: str, data: bytes) -> dict[str, Any]:
    place.put(key, data, TYPE)
    return {"key": key, "sha256": sha(data), "size": len(data)}


def shard(place: BlobStore, number: int, pictures: Pictures, data: bytes) -> dict[str, Any]:
    """A shard of one tar; its entry in the manifest."""
    files = [put(place, f"webdataset/train-{number:05d}.tar", data)] if data else []
    return {"stats": put(place, stats_key(number), stats(number, pictures, files)), "files": files}


def stats(number: int, pictures: Pictures, files: list[dict[str, Any]]) -> bytes:
    told = {
        "shard": number, "content": sha(""), "made": {}, "rows": [0, len(pictures)],
        "counts": {"accepted": len(pictures)}, "tries": {}, "failed": {}, "pictures": pictures,
        "bytes": 1, "signed": 0, "started_at": None, "finished_at": None, "render_s": 1.0,
        "gates": "", "measures": {}, "files": files,
    }  # fmt: skip
    return json_bytes(told)


def picture(row: int, job: str, pixels: str = "") -> tuple[int, str, str]:
    return row, sha(pixels or job), job


def dataset(folder: Path, *shards: Pictures, name: str = "test") -> BlobStore:
    """A finished one. A shard's tar holds its pictures' jobs."""
    place = open_blobs(str(folder))
    told = [shard(place, n, some, repr(some).encode()) for n, some in enumerate(shards)]
    manifest = {
        "name": name, "batch": "b", "rows": sum(map(len, shards)),
        "counts": {"accepted": sum(map(len, shards))}, "shards": told,
        "files": [put(place, "README.md", b"# card")],
    }  # fmt: skip
    place.put("manifest.json", json_bytes(manifest), TYPE)
    return place


def three(folder: Path) -> BlobStore:
    return dataset(folder, [picture(0, "a"), picture(1, "b")], [picture(2, "c")], [])


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
