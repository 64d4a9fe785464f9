"""Finished pictures on this machine's disk, while the blob store is away.

    <spool_dir>/<model>.<engine>/<random>/    one worker's; it holds a lock on `lock` while it lives
                                 /loose/      pictures of workers that ended before they could store

A picture is named after its job and its fingerprint. Whichever worker of the lane on this machine
claims that job again takes the picture and stores it, instead of rendering the same once more.
A file is one line of JSON and the picture's bytes. None is synced to the disk: what a power cut
spoils fails its hash, and the job is rendered again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from farm.catalog import Lane
from farm.errors import BlobDamaged
from farm.pictures import sha256
from farm.units import show_size

log = logging.getLogger(__name__)
MOST_PICTURES = 10_000  # of one worker, each with its claim in memory
KEEP_S = 3 * 86_400.0  # loose pictures whose jobs nobody claimed here
LOCK, LOOSE, PARTIAL = "lock", "loose", ".part-"


class SpoolFull(Exception):
    """No more pictures can be held on this machine's disk."""


class Entry(NamedTuple):
    """A picture in this worker's directory."""

    name: str
    size: int  # of the file, bytes


class Spool:
    """The spool of one worker, at most `most_bytes` large. Safe from any thread."""

    def __init__(self, directory: Path, lane: Lane, most_bytes: int) -> None:
        self._root, self._most = directory, most_bytes
        self._lane = directory / f"{lane.model}.{lane.engine}"
        self._loose = self._lane / LOOSE
        self._lock = threading.Lock()
        self._own: Path | None = None
        self._held: IO[bytes] | None = None
        self._bytes, self._count = 0, 0

    def add(self, name: str, data: bytes, render_s: float) -> Entry:
        """Write a picture whole or not at all. Raises SpoolFull."""
        head = json.dumps({"sha256": sha256(data), "render_s": render_s}).encode() + b"\n"
        size = len(head) + len(data)
        try:
            with self._lock:
                self._check_room(size)
                own = self._directory()
                self._bytes, self._count = self._bytes + size, self._count + 1
            try:
                _write(own, name, head + data)
            except BaseException:
                self._forget(size)
                raise
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise SpoolFull(f"the spool {self._root} takes no more: {why}") from error
        return Entry(name, size)

    def read(self, entry: Entry) -> tuple[bytes, float]:
        """The picture, and how long its render took in seconds.

        Raises BlobDamaged: with that its job goes back and costs nothing.
        """
        try:
            assert self._own
            head, _, data = (self._own / entry.name).read_bytes().partition(b"\n")
            told = json.loads(head)
            if told["sha256"] != sha256(data):
                raise ValueError("its hash is another")
            return data, float(told["render_s"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("%s in the spool is damaged: %s", entry.name, error)
            raise BlobDamaged("its picture in the worker's spool was damaged") from error

    def drop(self, entry: Entry) -> None:
        """Delete a picture: it is stored, or nobody wants it."""
        if self._own:
            with suppress(OSError):
                (self._own / entry.name).unlink()
        self._forget(entry.size)

    def loosen(self, entry: Entry) -> None:
        """Leave a picture to whoever claims its job next."""
        if self._own:
            with suppress(OSError):
                _make(self._loose)
                (self._own / entry.name).rename(self._loose / entry.name)
        self._forget(entry.size)

    def loose(self) -> set[str]:
        """The names of the pictures that wait for a claim of their jobs."""
        try:
            return set(os.listdir(self._loose))
        except OSError:
            return set()

    def take(self, name: str) -> Entry | None:
        """Make a loose picture this worker's; None: another was faster."""
        try:
            with self._lock:
                own = self._directory()
                (self._loose / name).rename(own / name)
                size = (own / name).stat().st_size
                self._bytes, self._count = self._bytes + size, self._count + 1
        except OSError:
            return None
        return Entry(name, size)

    def sweep(self) -> None:
        """Loosen what dead workers left; delete what is old, and the oldest beyond the bound."""
        with suppress(OSError):
            for found in self._lane.iterdir():
                if found.name != LOOSE and found != self._own:
                    self._inherit(found)
        with suppress(OSError):
            self._trim()

    def close(self) -> None:
        """Let go of the directory. What still lies in it, the next sweep loosens."""
        with self._lock:
            if self._held and self._own:
                with suppress(OSError):
                    (self._own / LOCK).unlink()
                    self._own.rmdir()  # unless it holds pictures
                self._held.close()
            self._own = self._held = None

    # ---- within

    def _check_room(self, size: int) -> None:
        if self._bytes + size > self._most or self._count >= MOST_PICTURES:
            raise SpoolFull(
                f"the spool {self._root} is full: {self._count:,} pictures of "
                f"{show_size(self._bytes)}; spool_max is {show_size(self._most)}"
            )

    def _forget(self, size: int) -> None:
        with self._lock:
            self._bytes, self._count = self._bytes - size, self._count - 1

    def _directory(self) -> Path:
        """This worker's own, made when it is needed first. Raises OSError."""
        while self._own is None:
            for directory in (self._root, self._lane):
                _make(directory)
            if self._root.stat().st_uid != os.getuid():
                raise PermissionError(1, "it belongs to another user; set spool_dir")
            own = self._lane / secrets.token_hex(8)
            _make(own)
            with suppress(FileNotFoundError, BlockingIOError):  # swept just now: another one
                self._held, self._own = _locked(own), own
        return self._own

    def _inherit(self, directory: Path) -> None:
        """Loosen what lies there if its worker is dead: a lock ends with its process."""
        try:
            lock = _locked(directory, create=False)
        except FileNotFoundError:  # killed before it had a lock, or after it let it go
            lock = None
        except (BlockingIOError, NotADirectoryError):
            return
        pictures = [p for p in directory.iterdir() if p.name != LOCK]
        for path in pictures:
            if path.name.startswith(PARTIAL):
                path.unlink(missing_ok=True)
            else:
                _make(self._loose)
                path.rename(self._loose / path.name)
        if pictures:
            log.info("%d finished pictures of a worker that ended were found", len(pictures))
        if lock:
            (directory / LOCK).unlink()
        directory.rmdir()
        if lock:
            lock.close()

    def _trim(self) -> None:
        found = []
        for path in self._loose.iterdir():
            with suppress(FileNotFoundError):  # taken since
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        total = 0
        for written, size, path in sorted(found, reverse=True):
            total += size
            if total > self._most or time.time() - written > KEEP_S:
                path.unlink(missing_ok=True)
                log.warning("%s is dropped: it is old, or too much lies in the spool", path)


def _make(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(directory: Path, name: str, data: bytes) -> None:
    partial = directory / f"{PARTIAL}{name}"
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        partial.rename(directory / name)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _locked(directory: Path, *, create: bool = True) -> IO[bytes]:
    """The lock of a directory, held until it is closed.

    Raises BlockingIOError where another process holds it, and FileNotFoundError where it is gone.
    """
    path = directory / LOCK
    lock = path.open("ab" if create else "rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            raise FileNotFoundError(path)
    except BaseException:
        lock.close()
        raise
    return lock
