"""A new entry for models.toml: appended, so that nothing that stands there is touched."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from farm.catalog import Lane, ModelEntry, Weights, load_catalog
from farm.config import Settings
from farm.errors import Invalid, InvalidConfig
from farm.models.fetch import lock_local
from farm.models.guard import Hosts
from farm.models.listing import from_hub, wanted
from farm.models.lock import Locked, LockedFile, alone, lock_path, put_files, write_whole
from farm.models.part import Flow
from farm.models.transfer import Client
from farm.spec import NAME_PATTERN


@dataclass(frozen=True)
class NewModel:
    """What a person says of a model; `weights` as in models.toml."""

    name: str
    engine: str
    weights: dict[str, Any]
    licence: str = ""

    @property
    def lane(self) -> Lane:
        return Lane(self.name, self.engine)

    def checked(self) -> Weights:
        """Raises Invalid with the field that is wrong."""
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise Invalid(f"name: {ascii(self.name)[:80]} is not made of a-z, 0-9, - and _")
        try:
            engines = {self.engine: Weights.model_validate(self.weights)}
            entry = ModelEntry.model_validate({"licence": self.licence, "engines": engines})
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise Invalid(f"{where or 'weights'}: {first['msg']}".replace("\n", " ")) from None
        return next(iter(entry.engines.values()))


def asked_of_hub(
    settings: Settings, new: NewModel, token: str, retries: int
) -> tuple[NewModel, Locked]:
    """The entry pinned to the commit that the hub names, with its licence, and its files.

    Raises HubUnavailable when the hub does not answer or has no such repository.
    """
    weights, hub = new.checked(), settings.hub_url
    hosts = Hosts([hub], settings.hub_hosts)
    client = Client(hosts, Flow(), hub_url=hub, token=token, retries=retries)
    listing = from_hub(client, hub, str(weights.repo), weights.revision)
    listing = wanted(listing, weights, new.engine)
    pinned = {**new.weights, "revision": weights.revision or listing.revision}
    new = replace(new, weights=pinned, licence=new.licence or listing.licence)
    files = {f.name: LockedFile(size=f.size, sha256=f.sha256) for f in listing.files}
    locked = Locked(source=new.checked().source, revision=listing.revision, files=files)
    return new, locked


def add(settings: Settings, new: NewModel, locked: Locked | None = None) -> Path:
    """Append the entry, and lock its files where they are known; the models.toml.

    Raises Invalid when the name is taken, InvalidConfig when the file would not be read again.
    """
    path = settings.catalog_path or settings.home / "models.toml"
    weights = new.checked()
    if locked is None and weights.path:
        locked = lock_local(weights, new.engine)[1]
    elif locked is None and weights.url:
        file = LockedFile(sha256=weights.sha256)
        locked = Locked(source=weights.source, files={weights.file_name: file})
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        text = _read(path)
        if new.name in load_catalog(path if path.exists() else None).models:
            raise Invalid(f"there is a model {new.name} already; change it in {path}")
        text += ("" if not text or text.endswith("\n") else "\n") + ("\n" if text else "")
        text += entry_text(new)
        _try(path, text)
        write_whole(path, text)
    if locked is not None:
        put_files(lock_path(path), new.lane, locked)
    return path


def entry_text(new: NewModel) -> str:
    """The entry as TOML."""
    lines = [f"[models.{new.name}]", f"licence = {_value(new.licence or 'unknown')}"]
    lines += [f"[models.{new.name}.engines.{new.engine}]"]
    lines += [f"{key} = {_value(value)}" for key, value in new.weights.items() if value]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A text, a list of texts or a truth value: TOML writes them as JSON does."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path}: {error}") from None


def _try(path: Path, text: str) -> None:
    try:
        text.encode("utf-8")
        tomllib.loads(text)
    except (UnicodeEncodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(
            f"{path}: a table [models.NAME] cannot be appended to it ({error}); add it by hand"
        ) from None
