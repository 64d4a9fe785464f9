"""models.lock: which files, by size and SHA-256, each model of models.toml stands for.

JSON beside models.toml, sorted and small, meant for version control: whoever fetches by it gets
the same bytes, whatever has happened on the hub since.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from farm.catalog import Lane
from farm.errors import InvalidConfig, UntrustedModel
from farm.faults import sentence
from farm.spec import NAME_PATTERN

_MAX_NAME, _MAX_PART = 1000, 240  # bytes; most file systems hold 255 a part


def safe_name(name: object) -> str:
    """A file's name relative to its model's directory, proven to stay inside it.

    Raises UntrustedModel for anything else: absolute, `..`, a backslash, control characters.
    """
    text = name if isinstance(name, str) else ""
    parts = text.split("/")
    good = all(part not in ("", ".", "..") and part.isprintable() for part in parts)
    if good and "\\" not in text:
        raw = [len(part.encode("utf-8")) for part in parts]
        if max(raw) <= _MAX_PART and sum(raw) <= _MAX_NAME:
            return text
    raise UntrustedModel(
        f"the file name {ascii(name)[:120]} does not stay inside the model: refused"
    )


def _name(name: str) -> str:
    try:
        return safe_name(name)
    except UntrustedModel as error:
        raise ValueError(error.message) from None


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedFile(_Entry):
    """Size in bytes and SHA-256 of a file; None: not known before the first fetch."""

    size: Annotated[int, Field(ge=0, lt=2**50)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class Locked(_Entry):
    """The files of one model for one engine, and the source that they were taken from."""

    source: dict[str, Any] = {}
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    files: dict[Annotated[str, AfterValidator(_name)], LockedFile] = {}


class LockedModel(_Entry):
    """`accepted`: the licence whose terms a person said yes to."""

    accepted: str | None = None
    engines: dict[str, Locked] = {}


class Lock(_Entry):
    version: Literal[1] = 1
    models: dict[Annotated[str, Field(pattern=NAME_PATTERN)], LockedModel] = {}

    def find(self, lane: Lane, source: dict[str, Any]) -> Locked | None:
        """The lane's entry, if it is of this source."""
        model = self.models.get(lane.model)
        found = model.engines.get(lane.engine) if model else None
        return found if found and found.source == source else None


def lock_path(catalog_path: Path) -> Path:
    """The lock of a models.toml."""
    return catalog_path.with_suffix(".lock")


def read_lock(path: Path) -> Lock:
    """The lock, empty when there is none yet. Raises InvalidConfig for a broken one."""
    try:
        return Lock.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InvalidConfig(f"{path}: {sentence(first, 'lock')}") from None


def put_files(path: Path, lane: Lane, locked: Locked) -> None:
    """Record the files of a lane."""

    def changed(model: LockedModel) -> LockedModel:
        return model.model_copy(update={"engines": {**model.engines, lane.engine: locked}})

    _change(path, lane.model, changed)


def put_accepted(path: Path, model: str, licence: str) -> None:
    """Record that the terms of a licence were accepted."""
    _change(path, model, lambda found: found.model_copy(update={"accepted": licence}))


def _change(path: Path, name: str, change: Callable[[LockedModel], LockedModel]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        lock = read_lock(path)
        models = {**lock.models, name: change(lock.models.get(name, LockedModel()))}
        if models == lock.models:  # it may lie where nothing can be written
            return
        text = Lock(models=models).model_dump(mode="json", exclude_none=True)
        write_whole(path, _sorted_json(text))


def _sorted_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a directory against other processes of the farm; waits until it is free."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a new one that appears whole; its mode stays."""
    path = path.resolve()
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        if path.exists():
            fresh.chmod(path.stat().st_mode & 0o777)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
