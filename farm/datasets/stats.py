"""What is told of a shard, in stats/: read with doubt, for anybody can have changed it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from farm.blobs import README, BlobStore, check_key
from farm.datasets.gates import Measures
from farm.errors import BlobNotFound

LAYOUT = 1  # of shards and stats; a shard of another one is written anew
MAX_JSON = 2**30  # bytes
MANIFEST, CROISSANT, RECIPE = "manifest.json", "croissant.json", "recipe.toml"
LOOSE = (MANIFEST, README, CROISSANT, RECIPE)
OWN = ("webdataset/", "parquet/", "imagefolder/", "stats/")
"""Below these, what no manifest names is left over from an earlier run."""


def _own(key: str) -> str:
    if key not in LOOSE and not key.startswith(OWN):
        raise ValueError(f"no file of a dataset is named {key[:60]!r}")
    return check_key(key)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, AfterValidator(_own)]


class File(BaseModel):
    """A file of a dataset: its key, its SHA-256, its size in bytes."""

    model_config = ConfigDict(frozen=True)

    key: Key
    sha256: Hash
    size: Count


class FileTold(TypedDict):
    """A `File` as stats have it."""

    key: Key
    sha256: Hash
    size: Count


class Stats(TypedDict):
    """Of a shard. The same rows and pictures always make the same.

    `content`: SHA-256 of all that decides the bytes of its files. `made`: pictures of each size,
    file format, model and LoRA. `rows`: the first, and the one behind the last. `tries`: what was
    rejected before, by row. `pictures`: of each accepted row its number, the picture's SHA-256 and
    a mark of what was asked for. `signed`: how many of them carry a C2PA manifest. `started_at`,
    `finished_at`: of its first and its last job, UTC. `measures`: by SHA-256 of the picture, as
    `gates` (a mark) has them.
    """

    shard: Count
    content: Hash
    made: dict[str, dict[str, Count]]
    rows: tuple[Count, Count]
    counts: dict[str, Count]
    tries: dict[str, list[dict[str, Any]]]
    failed: dict[str, dict[str, Any]]
    pictures: list[tuple[Count, Hash, str]]
    bytes: Count
    signed: Count
    started_at: str | None
    finished_at: str | None
    render_s: float
    gates: str
    measures: dict[str, Measures]
    files: list[FileTold]


_STATS: TypeAdapter[Stats] = TypeAdapter(Stats)


def stats_key(shard: int) -> str:
    return f"stats/{shard:05d}.json"


def read_stats(place: BlobStore, key: str) -> Stats | None:
    """None where there are none, or what lies there is none."""
    try:
        return _STATS.validate_python(read_json(place, key))
    except ValidationError:
        return None


def read_json(place: BlobStore, key: str) -> Any:
    """A JSON object; None where there is none, or it cannot be read as one."""
    data = bytearray()
    try:
        for chunk in place.chunks(key):
            data += chunk
            if len(data) > MAX_JSON:
                return None
        found = json.loads(data)
    except (BlobNotFound, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def json_bytes(value: Any) -> bytes:
    """As it is stored: sorted, a line a value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1).encode() + b"\n"


def hash_of(place: BlobStore, key: str) -> str | None:
    """The SHA-256 of an object's bytes; None where there is none."""
    digest = hashlib.sha256()
    try:
        for chunk in place.chunks(key):
            digest.update(chunk)
    except BlobNotFound:
        return None
    return digest.hexdigest()
