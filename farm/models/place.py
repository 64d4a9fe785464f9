"""The directory of one lane's weights: how it comes to be, whole or not at all.

Below models_dir, `NAME/ENGINE/` is what engines load. While files come they lie beside it in
`.ENGINE-KEY.parts` (the key stands for source and revision), where a later fetch, of whatever
process, goes on from the byte it has. One rename makes the whole appear.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farm.catalog import NOTE
from farm.errors import EnvironmentFault
from farm.models.lock import Locked

MARGIN = 256 * 2**20  # bytes of the disk that are left free


def read_note(place: Path, source: dict[str, Any]) -> Locked | None:
    """What was fetched to this place, if it was from this source."""
    try:
        found = Locked.model_validate_json((place / NOTE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if found.source == source else None


def complete(place: Path, found: Locked) -> bool:
    """Whether every file is there at its length."""
    try:
        return all((place / n).stat().st_size == f.size for n, f in found.files.items())
    except OSError:
        return False


def staging_for(place: Path, source: dict[str, Any], revision: str | None) -> Path:
    """Where the parts of this source at this revision lie."""
    text = json.dumps([source, revision], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    staging = place.with_name(f".{place.name}-{key}.parts")
    (staging / "files").mkdir(parents=True, exist_ok=True)
    return staging


def parts_of(staging: Path, names: Iterable[str]) -> list[Path]:
    """The part of each file; one that a killed process had moved into the whole goes back."""
    parts = []
    for name in names:
        part = staging / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.part"
        if not part.exists() and (staging / "files" / name).is_file():
            os.replace(staging / "files" / name, part)
        parts.append(part)
    return parts


def check_space(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if needed + MARGIN > free:
        raise EnvironmentFault(
            f"{place.parent}: {free / 2**30:.1f} GiB are free and {needed / 2**30:.1f} GiB are "
            "needed; free some space, or choose another FARM_MODELS_DIR"
        )


def appear(staging: Path, parts: list[Path], found: Locked, place: Path) -> None:
    """From parts to the whole, by one rename; what stood there before goes."""
    whole = staging / "files"
    shutil.rmtree(whole)
    for part, name in zip(parts, found.files, strict=True):
        target = whole / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
    text = json.dumps(found.model_dump(mode="json"), indent=1, sort_keys=True)
    (whole / NOTE).write_text(text + "\n", encoding="utf-8")
    _sync(whole)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(whole, place)
    _sync(place.parent)
    for rest in (old, *place.parent.glob(f".{place.name}-*.parts")):
        shutil.rmtree(rest, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_at(place: Path) -> Iterator[None]:
    """Only one process writes a lane's files. Raises EnvironmentFault when another does."""
    descriptor = os.open(place.with_name(f".{place.name}.busy"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(f"another process writes {place} now") from None
        yield
    finally:
        os.close(descriptor)
