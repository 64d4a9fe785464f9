"""A new model or LoRA for models.toml, and what its files are for models.lock."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from farm.catalog import LORA, Lane, LoraEntry, ModelEntry, Weights
from farm.config import Settings
from farm.errors import Invalid
from farm.faults import sentence
from farm.models.entry import append_entry
from farm.models.families import family_defaults, family_of
from farm.models.fetch import lock_local
from farm.models.guard import Hosts
from farm.models.listing import from_hub, wanted
from farm.models.lock import Locked, LockedFile, lock_path, put_files
from farm.models.part import Flow
from farm.models.transfer import Client
from farm.spec import NAME_PATTERN


@dataclass(frozen=True)
class NewEntry:
    """What a person says of a model, or of a LoRA where `engine` is LORA.

    `weights` and `about` (licence, family, ...; for a LoRA also models) as in models.toml.
    """

    name: str
    engine: str
    weights: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def lane(self) -> Lane:
        return Lane(self.name, self.engine)

    @property
    def table(self) -> dict[str, Any]:
        """The entry as in models.toml."""
        about = {**self.about, "licence": self.about.get("licence") or "unknown"}
        if self.engine == LORA:
            return {**about, "weights": self.weights}
        return {**about, "engines": {self.engine: self.weights}}

    def checked(self) -> Weights:
        """Its weights. Raises Invalid with the field that is wrong."""
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise Invalid(f"name: {ascii(self.name)[:80]} is not made of a-z, 0-9, - and _")
        try:
            if self.engine == LORA:
                return LoraEntry.model_validate(self.table).weights
            return next(iter(ModelEntry.model_validate(self.table).engines.values()))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise Invalid(sentence(first).replace("\n", " ")) from None

    def with_defaults(self, pipeline: str = "") -> NewEntry:
        """With the family that the pipeline's class tells, and the family's size and steps.

        What was said stays as it is; a LoRA has neither.
        """
        if self.engine == LORA:
            return self
        names = (self.name, str(self.weights.get("repo", "")), self.checked().file_name)
        family = self.about.get("family") or family_of(pipeline, *names)
        defaults = family_defaults(family, *names) if family else None
        if defaults is None:
            return self
        told = {"family": family, "defaults": defaults.model_dump(exclude_none=True)}
        return replace(self, about={**told, **self.about})


def asked_of_hub(
    settings: Settings, new: NewEntry, token: str, retries: int
) -> tuple[NewEntry, Locked]:
    """The entry pinned to the commit that the hub names, with its licence and family; its files.

    Raises HubUnavailable when the hub does not answer or has no such repository.
    """
    weights, hub = new.checked(), settings.hub_url
    hosts = Hosts([hub], settings.hub_hosts)
    client = Client(hosts, Flow(), hub_url=hub, token=token, retries=retries)
    listing = from_hub(client, hub, str(weights.repo), weights.revision)
    listing = wanted(listing, weights, new.engine)
    pinned = {**new.weights, "revision": weights.revision or listing.revision}
    about = {**new.about, "licence": new.about.get("licence") or listing.licence}
    new = replace(new, weights=pinned, about=about).with_defaults(listing.pipeline)
    files = {f.name: LockedFile(size=f.size, sha256=f.sha256) for f in listing.files}
    locked = Locked(source=new.checked().source, revision=listing.revision, files=files)
    return new, locked


def add(settings: Settings, new: NewEntry, locked: Locked | None = None) -> tuple[Path, NewEntry]:
    """Append the entry, and lock its files where they are known; the models.toml and the entry.

    Raises Invalid when the name is taken, InvalidConfig when the file would not be read again.
    """
    weights = new.checked()
    new = new.with_defaults(_pipeline_in(weights.path))
    if locked is None and weights.path:
        locked = lock_local(weights, new.engine)[1]
    elif locked is None and weights.url:
        file = LockedFile(sha256=weights.sha256)
        locked = Locked(source=weights.source, files={weights.file_name: file})
    path = append_entry(settings, "loras" if new.engine == LORA else "models", new.name, new.table)
    if locked is not None:
        put_files(lock_path(path), new.lane, locked)
    return path, new


def _pipeline_in(path: Path | None) -> str:
    """The class that a directory's model_index.json names, if any."""
    try:
        index = json.loads((path / "model_index.json").read_bytes()) if path else None
    except (OSError, ValueError):
        return ""
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else ""
