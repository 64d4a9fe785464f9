"""Bring a model's files to this machine: whole, checked, or not at all."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farm.catalog import Lane, Weights
from farm.config import Settings
from farm.errors import EnvironmentFault, HubUnavailable, InvalidConfig, UntrustedModel
from farm.models.guard import Hosts
from farm.models.listing import Listing, Remote, from_directory, from_hub, from_lock, wanted
from farm.models.lock import Lock, Locked, LockedFile, lock_path, put_files, read_lock
from farm.models.part import Flow, Part
from farm.models.place import (
    alone_at,
    appear,
    check_space,
    complete,
    parts_of,
    read_note,
    staging_for,
)
from farm.models.transfer import Client
from farm.weight_files import sha256_of

PARALLEL = 4
_BLOCK = 256 * 2**10


class Progress:
    """What a fetch tells while it runs; does nothing itself. Called from several threads."""

    def start(self, lane: Lane, total: int | None, have: int) -> None:
        """Bytes in all, if known, and those that are here already."""

    def advance(self, n: int) -> None:
        """n more bytes; fewer if negative, when a file is begun anew."""


@dataclass(frozen=True)
class Order:
    """How to fetch. `source`: a directory or the URL of a mirror, instead of where the entry says.

    `rate`: bytes a second; `update`: take what the hub has now, whatever the lock says.
    """

    source: str | None = None
    rate: float | None = None
    retries: int = 5
    update: bool = False
    token: str = ""


@dataclass(frozen=True)
class Fetched:
    """A lane's files are here. `received`: bytes that came now."""

    model: str
    engine: str
    state: str  # fetched, already here
    path: Path
    revision: str | None
    files: int
    size: int
    received: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


class Fetcher:
    """Fetches lanes of one catalogue by one order."""

    def __init__(self, settings: Settings, order: Order, progress: Progress | None = None) -> None:
        self.settings, self.order = settings, order
        self.lock_file = lock_of(settings)
        self.progress = progress or Progress()
        self.flow = Flow(order.rate)

    def fetch(self, lane: Lane, weights: Weights) -> Fetched:
        """Bring one lane's files. Raises EnvironmentFault, UntrustedModel or InvalidConfig."""
        begun = time.monotonic()
        self.flow = Flow(self.order.rate)
        lock = read_lock(self.lock_file)
        if weights.path:
            return self._local(lane, weights, lock)
        place = self.settings.models_path / lane.model / lane.engine
        place.parent.mkdir(parents=True, exist_ok=True)
        with alone_at(place):
            locked = None if self.order.update else lock.find(lane, weights.source)
            here = read_note(place, weights.source)
            if here and not self.order.update and _agree(here, locked) and complete(place, here):
                put_files(self.lock_file, lane, here)
                return _told(lane, place, here, "already here")
            listing = self._listing(lane, weights, locked)
            found = self._bring(lane, weights, place, listing)
        put_files(self.lock_file, lane, found)
        seconds = round(time.monotonic() - begun, 2)
        told = _told(lane, place, found, "fetched")
        return replace(told, received=self.flow.received, seconds=seconds)

    def _local(self, lane: Lane, weights: Weights, lock: Lock) -> Fetched:
        """Weights that a person put here: nothing to bring, only to lock."""
        place, found = lock_local(weights, lane.engine)
        locked = lock.find(lane, weights.source)
        if locked and not self.order.update and locked.files != found.files:
            raise UntrustedModel(
                f"{weights.path}: not the files of {self.lock_file.name}; `farm models verify` "
                "says which, --update takes them as they are"
            )
        put_files(self.lock_file, lane, found)
        return _told(lane, place, found, "already here")

    def _client(self, weights: Weights) -> Client:
        hub, mirror = self.settings.hub_url, self.order.source
        urls = [url for url in (hub, weights.url, mirror) if url and "://" in url]
        hosts = Hosts(urls, self.settings.hub_hosts)
        token, retries = self.order.token, self.order.retries
        return Client(hosts, self.flow, hub_url=hub, token=token, retries=retries)

    def _listing(self, lane: Lane, weights: Weights, locked: Locked | None) -> Listing:
        source = self.order.source
        if source and "://" not in source:
            found = self._of_directory(Path(source), lane, weights, locked)
        elif weights.url:
            name = weights.file_name
            url = f"{source.rstrip('/')}/{name}" if source else weights.url
            found = Listing(None, (Remote(name, url, self._client(weights).size(url)),))
        else:
            found = self._of_hub(source, weights, locked)
        if locked and locked.files:
            found = _as_locked(found, locked, self.lock_file.name)
        else:
            found = found if weights.url else wanted(found, weights, lane.engine)
        if weights.url:
            found = replace(found, files=(replace(found.files[0], sha256=weights.sha256),))
        return found

    def _of_hub(self, mirror: str | None, weights: Weights, locked: Locked | None) -> Listing:
        """The hub's files, or the mirror's; a mirror without an API gives what the lock names."""
        client = self._client(weights)
        asked = (locked.revision if locked else None) or weights.revision
        try:
            return from_hub(client, mirror or self.settings.hub_url, str(weights.repo), asked)
        except HubUnavailable:
            if mirror and locked and locked.files:
                return from_lock(locked, mirror)
            raise

    def _of_directory(
        self, root: Path, lane: Lane, weights: Weights, locked: Locked | None
    ) -> Listing:
        """A directory of the files themselves, a models_dir, or a mirror by repositories."""
        if not root.is_dir():
            raise InvalidConfig(f"--from {root}: no such directory")
        inner = (root / lane.model / lane.engine, root / (weights.repo or lane.model), root)
        found = from_directory(next(place for place in inner if place.is_dir()))
        if weights.url:
            files = tuple(file for file in found.files if file.name == weights.file_name)
            if not files:
                raise InvalidConfig(f"--from {root}: there is no {weights.file_name}")
            found = Listing(None, files)
        return replace(found, revision=locked.revision if locked else None)

    def _bring(self, lane: Lane, weights: Weights, place: Path, listing: Listing) -> Locked:
        staging = staging_for(place, weights.source, listing.revision)
        parts = parts_of(staging, (file.name for file in listing.files))
        have = sum(part.stat().st_size for part in parts if part.exists())
        total = sum(file.size or 0 for file in listing.files)
        known = all(file.size is not None for file in listing.files)
        check_space(staging, total - have)
        self.progress.start(lane, total if known else None, have)
        hashes = self._transfer(weights, listing, parts)
        files = {
            file.name: LockedFile(size=part.stat().st_size, sha256=digest)
            for file, part, digest in zip(listing.files, parts, hashes, strict=True)
        }
        found = Locked(source=weights.source, revision=listing.revision, files=files)
        appear(staging, parts, found, place)
        return found

    def _transfer(self, weights: Weights, listing: Listing, parts: list[Path]) -> list[str]:
        """Bring all files, four at a time; the first failure ends the others. Their SHA-256."""
        remote = any(isinstance(file.place, str) for file in listing.files)
        client = self._client(weights) if remote else None
        with ThreadPoolExecutor(PARALLEL) as pool:
            pairs = zip(listing.files, parts, strict=True)
            futures = [pool.submit(self._one, client, file, part) for file, part in pairs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                first = next((future for future in done if future.exception()), None)
                if first is not None:
                    first.result()
                return [future.result() for future in futures]
            except BaseException:
                self.flow.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, client: Client | None, file: Remote, path: Path) -> str:
        """Bring one file; its SHA-256. Wrong bytes are removed and refused."""
        with Part(path, self.progress.advance) as part:
            try:
                if isinstance(file.place, Path):
                    self._copy(file.place, part)
                elif client is not None:
                    client.download(file.place, part, file.size)
                digest = part.finish()
                _check(file, path, digest, part.length)
            except UntrustedModel:
                path.unlink(missing_ok=True)
                raise
        return digest

    def _copy(self, source: Path, part: Part) -> None:
        part.restart()
        with source.open("rb") as opened:
            while data := opened.read(_BLOCK):
                if self.flow.stop.is_set():
                    raise EnvironmentFault("stopped")
                self.flow.take(len(data))
                part.write(data)


def lock_of(settings: Settings) -> Path:
    """The lock of the catalogue in force. Raises InvalidConfig when there is none."""
    if settings.catalog_path is None:
        raise InvalidConfig("there is no models.toml; `farm models add` begins one")
    return lock_path(settings.catalog_path)


def lock_local(weights: Weights, engine: str) -> tuple[Path, Locked]:
    """The directory of weights on this machine, and its files with their hashes."""
    path = weights.path or Path()
    if path.is_file():
        files: tuple[Remote, ...] = (Remote(path.name, path, path.stat().st_size),)
        root = path.parent
    elif path.is_dir():
        files, root = wanted(from_directory(path), weights, engine).files, path
    else:
        raise InvalidConfig(f"{path}: there is no such file or directory")
    locked = {f.name: LockedFile(size=f.size, sha256=sha256_of(root / f.name)) for f in files}
    return root, Locked(source=weights.source, files=locked)


def _agree(here: Locked, locked: Locked | None) -> bool:
    """Whether what is here is what the lock wants; hashes it does not know are not asked for."""
    if locked is None or not locked.files:
        return True
    pairs = [(want.sha256, here.files.get(name)) for name, want in locked.files.items()]
    known = all(file and digest in (None, file.sha256) for digest, file in pairs)
    return known and set(here.files) == set(locked.files)


def _told(lane: Lane, place: Path, found: Locked, state: str) -> Fetched:
    size = sum(file.size or 0 for file in found.files.values())
    return Fetched(*lane, state, place, found.revision, len(found.files), size)


def _as_locked(listing: Listing, locked: Locked, lock: str) -> Listing:
    """The locked files of a listing, with their locked hashes; UntrustedModel if they differ."""
    offered = {file.name: file for file in listing.files}
    files = []
    for name, wants in locked.files.items():
        file = offered.get(name)
        if file is None:
            raise UntrustedModel(f"{name}: in {lock}, but not offered; --update forgets the lock")
        for told, want in ((file.size, wants.size), (file.sha256, wants.sha256)):
            if told is not None and want is not None and told != want:
                raise UntrustedModel(f"{name}: {told} is offered, {lock} says {want}")
        files.append(
            replace(file, size=wants.size or file.size, sha256=wants.sha256 or file.sha256)
        )
    return replace(listing, files=tuple(files))


def _check(file: Remote, path: Path, digest: str, length: int) -> None:
    if file.size is not None and length != file.size:
        raise UntrustedModel(f"{file.name}: {length:,} bytes came, {file.size:,} were told")
    if file.sha256 and digest != file.sha256:
        raise UntrustedModel(
            f"{file.name}: wrong bytes came, SHA-256 {digest} and not {file.sha256}; removed"
        )
    if file.git_oid and not file.sha256 and _git_oid(path, length) != file.git_oid:
        raise UntrustedModel(f"{file.name}: wrong bytes came (git id not {file.git_oid})")


def _git_oid(path: Path, length: int) -> str:
    """The id git gives a file: SHA-1 of a header and its bytes."""
    digest = hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
    with path.open("rb") as opened:
        while data := opened.read(_BLOCK):
            digest.update(data)
    return digest.hexdigest()
