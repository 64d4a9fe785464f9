"""Are the weights on this machine those of the lock, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from farm.catalog import Lane, Weights
from farm.config import Settings
from farm.errors import InvalidConfig, UntrustedModel
from farm.models.listing import from_directory, wanted
from farm.models.lock import Lock, Locked, LockedFile, lock_path, read_lock
from farm.weight_files import sha256_of

What = Literal["changed", "missing", "extra", "not fetched", "not locked"]


@dataclass(frozen=True)
class Fault:
    """What is not as the lock says; `file` is empty where it is the whole."""

    model: str
    engine: str
    what: What
    file: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verified:
    """A lane that was looked at: its files, their bytes, its faults."""

    lane: Lane
    files: int
    size: int
    faults: tuple[Fault, ...]


def lane_place(settings: Settings, lane: Lane, weights: Weights) -> Path:
    """The directory that holds a lane's files (or would, once fetched)."""
    if weights.path:
        return weights.path.parent if weights.path.is_file() else weights.path
    return settings.models_path / lane.model / lane.engine


def locked_lanes(settings: Settings) -> Lock:
    """The lock of the catalogue in force."""
    path = settings.catalog_path
    return read_lock(lock_path(path)) if path else Lock()


def locked_size(settings: Settings, lane: Lane, weights: Weights) -> int:
    """Bytes that a verification of the lane hashes."""
    locked = locked_lanes(settings).find(lane, weights.source)
    return sum(file.size or 0 for file in locked.files.values()) if locked else 0


def verify(
    settings: Settings, lane: Lane, weights: Weights, hashed: Callable[[int], None] = lambda n: None
) -> Verified:
    """Hash a lane's files against the lock; `hashed` is told the bytes of each file."""
    locked = locked_lanes(settings).find(lane, weights.source)
    place = lane_place(settings, lane, weights)
    if locked is None or not locked.files:
        return Verified(lane, 0, 0, (Fault(*lane, "not locked"),))
    if not place.is_dir():
        return Verified(lane, 0, 0, (Fault(*lane, "not fetched"),))

    def check(item: tuple[str, LockedFile]) -> What | None:
        name, want = item
        verdict = _verdict(place / name, want)
        hashed(want.size or 0)
        return verdict

    with ThreadPoolExecutor(4) as pool:
        verdicts = zip(locked.files, pool.map(check, locked.files.items()), strict=True)
        faults = [Fault(*lane, what, name) for name, what in verdicts if what]
    faults += [Fault(*lane, "extra", name) for name in _extra(place, weights, lane, locked)]
    size = sum(file.size or 0 for file in locked.files.values())
    return Verified(lane, len(locked.files), size, tuple(faults))


def _verdict(path: Path, want: LockedFile) -> What | None:
    try:
        if not path.is_file():
            return "missing"
        if want.size is not None and path.stat().st_size != want.size:
            return "changed"
        return "changed" if want.sha256 and sha256_of(path) != want.sha256 else None
    except OSError:
        return "missing"


def _extra(place: Path, weights: Weights, lane: Lane, locked: Locked) -> Iterator[str]:
    """Files that no one fetched; of a person's own directory only those an engine might load."""
    if weights.path and weights.path.is_file():
        return
    try:
        found = from_directory(place)
        files = wanted(found, weights, lane.engine).files if weights.path else found.files
    except InvalidConfig:
        return
    except UntrustedModel as error:
        yield error.message
        return
    yield from (file.name for file in files if file.name not in locked.files)
