"""Blobs in a local directory: one file an object, written aside and moved into place."""

from __future__ import annotations

import errno
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import BinaryIO

from farm.blobs import (
    FILES_AT_ONCE,
    PIECE,
    BlobStat,
    check_expiry,
    check_key,
    check_prefix,
    is_key,
    probe,
)
from farm.blobs.aside import aside
from farm.errors import BlobNotFound, StorageRefused, StorageUnavailable

_TEMPORARY = ".tmp-"  # no key starts with a dot
_ASIDE = ".tmp-aside-"
MOST_TRIES = 100  # to write into a directory that others remove as empty
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class LocalBlobs:
    """The BlobStore of one machine. The directory is made by the first `put`.

    An object is on the disk (fsync of the file and its directory) when `put` returns. Symbolic
    links that lead out of the directory are refused; `list` follows none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = root.resolve()
        self._syncs = _SharedSyncs()

    def put(self, key: str, data: bytes, content_type: str) -> None:
        self._put(key, (data,))

    def put_files(self, files: Iterable[tuple[str, Path, str]]) -> None:
        files = list(files)
        for key, _, _ in files:
            check_key(key)
        with ThreadPoolExecutor(FILES_AT_ONCE, "put") as pool:
            directories = set(pool.map(lambda file: self._put_file(*file[:2]), files))
        for directory in directories:
            with self._faults(f"write into {directory.name}"):
                self._syncs.sync(directory)

    def _put_file(self, key: str, path: Path) -> Path:
        """The directory that it is in now, which has yet to be synced."""
        target = self._path(key)
        if any(above.name.startswith(_ASIDE) for above in path.parents):
            with self._faults(f"write {key}"):
                _sync(path, os.O_RDONLY)
                _in_directory(target.parent, lambda: os.replace(path, target))
        else:
            with path.open("rb") as file:
                self._put(key, _pieces(file, PIECE))
        return target.parent

    @contextmanager
    def aside(self) -> Iterator[Path]:
        with self._faults("write"):
            _make_directory(self._real_root)
            with aside(self._real_root, _ASIDE) as folder:
                yield folder

    def _put(self, key: str, pieces: Iterable[bytes]) -> None:
        path = self._path(key)
        temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with self._faults(f"write {key}"):
                _in_directory(path.parent, lambda: _write_file(temporary, pieces))
                os.replace(temporary, path)
                self._syncs.sync(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with self._faults(f"read {key}"):
            try:
                return path.read_bytes()
            except _ABSENT:
                raise BlobNotFound(f"there is no object {key} in {self.root}") from None

    def chunks(self, key: str, size: int = PIECE) -> Iterator[bytes]:
        return self._chunks(key, self._path(key), size)

    def _chunks(self, key: str, path: Path, size: int) -> Iterator[bytes]:
        with self._faults(f"read {key}"):
            try:
                file = path.open("rb")
            except _ABSENT:
                raise BlobNotFound(f"there is no object {key} in {self.root}") from None
            with file:
                yield from _pieces(file, size)

    def stat(self, key: str) -> BlobStat | None:
        path = self._path(key)
        with self._faults(f"look up {key}"):
            try:
                found = path.stat()
            except _ABSENT:
                return None
        regular = stat.S_ISREG(found.st_mode)
        return BlobStat(key, found.st_size, found.st_mtime) if regular else None

    def delete(self, keys: Iterable[str]) -> None:
        directories = set()
        for key, path in [(key, self._path(key)) for key in keys]:
            with self._faults(f"delete {key}"), suppress(*_ABSENT):
                path.unlink()
                directories.add(path.parent)
        for directory in directories:
            self._remove_empty(directory)

    def _remove_empty(self, directory: Path) -> None:
        """Remove the directory and those above it while they are empty; the root stays.

        A put that wants one of them at this moment makes it again.
        """
        with suppress(OSError):  # not empty, or gone already, or a mount of its own
            while directory != self._real_root:
                directory.rmdir()
                directory = directory.parent

    def list(self, prefix: str = "") -> Iterator[BlobStat]:
        check_prefix(prefix)
        return self._walk(prefix.rpartition("/")[0], prefix)

    def url(self, key: str, expires_s: int = 3600) -> str:
        check_expiry(expires_s)
        return self._path(key).as_uri()

    def check(self) -> None:
        probe(self, f"the directory {self.root}")

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, key: str) -> Path:
        path = self._real_root / check_key(key)
        if not self._has_link(key):  # the usual case, in a fifth of the time
            return path
        with self._faults(f"look up {key}"):
            try:
                real = path.resolve()
            except RuntimeError as exc:  # a loop of links
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from exc
        if not real.is_relative_to(self._real_root):
            raise StorageUnavailable(
                f"{key} is a symbolic link out of {self.root}: remove the link, or point the "
                f"blob URL at the directory that it leads to"
            )
        return real

    def _has_link(self, key: str) -> bool:
        ways = accumulate(key.split("/"), os.path.join, initial=str(self._real_root))
        return any(map(os.path.islink, islice(ways, 1, None)))

    def _walk(self, directory: str, prefix: str) -> Iterator[BlobStat]:
        with self._faults(f"list {directory or 'objects'}"):
            names = _names(self.root / directory)
        for name in names:
            key = f"{directory}/{name}" if directory else name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix):
                with suppress(FileNotFoundError):  # deleted since
                    found = (self.root / key).lstat()
                    yield BlobStat(key, found.st_size, found.st_mtime)

    @contextmanager
    def _faults(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            place = f"the directory {self.root}"
            if exc.errno in _FULL:
                text = f"cannot {action}: the disk of {place} is full; free some space there"
            elif exc.errno in _DENIED:
                raise StorageRefused(
                    f"cannot {action}: {place} is read-only or belongs to another user; "
                    f"make it writable, or name another"
                ) from exc
            elif self.root.is_file():
                text = f"cannot {action}: {self.root} is a file, not a directory"
            elif isinstance(exc, (FileExistsError, *_ABSENT)):
                text = f"cannot {action}: a file and a directory in {place} want the same name"
            else:
                text = f"cannot {action} in {place}: {exc.strerror or type(exc).__name__}"
            raise StorageUnavailable(text) from exc


@dataclass
class _Sync:
    """One fsync of a directory, before or while it runs."""

    ended: threading.Event = field(default_factory=threading.Event)
    error: OSError | None = None


class _SharedSyncs:
    """fsync of directories: those that ask while one runs share the next.

    A disk does a few hundred a second, small pictures come faster.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Path, _Sync] = {}
        self._next: dict[Path, _Sync] = {}

    def sync(self, directory: Path) -> None:
        """Return after an fsync that began after this call did. Raises OSError."""
        with self._lock:
            before = self._running.get(directory)
            leads = directory not in self._next
            mine = self._next.setdefault(directory, _Sync())
        if leads:
            if before:
                before.ended.wait()
            self._run(directory, mine)
        mine.ended.wait()
        if mine.error:
            raise mine.error

    def _run(self, directory: Path, mine: _Sync) -> None:
        with self._lock:  # from here on others wait for the one after this
            self._running[directory] = self._next.pop(directory)
        try:
            _sync_directory(directory)
        except OSError as error:
            mine.error = error
        finally:
            with self._lock:
                if self._running.get(directory) is mine:
                    del self._running[directory]
            mine.ended.set()


def _names(directory: Path) -> list[str]:
    """Files and directories (with a trailing slash) that can belong to a key, in key order.

    Names alone: of a million pictures in one directory they are about 100 MB.
    """
    found = []
    try:
        with os.scandir(directory) as scan:
            for entry in scan:
                if not is_key(entry.name):
                    continue
                if entry.is_file(follow_symlinks=False):
                    found.append(entry.name)
                elif entry.is_dir(follow_symlinks=False) and is_key(entry.name + "/x"):
                    found.append(entry.name + "/")
    except _ABSENT:
        return []
    found.sort()
    return found


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    while piece := file.read(size):
        yield piece


def _in_directory(directory: Path, do: Callable[[], None]) -> None:
    """Make a file in a directory that may be made, or removed as empty, at this moment."""
    for left in reversed(range(MOST_TRIES)):
        try:
            _make_directory(directory)
            return do()
        except (FileNotFoundError, FileExistsError):  # the latter: it went as mkdir looked at it
            if not left:
                raise


def _write_file(path: Path, pieces: Iterable[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, how: int) -> None:
    descriptor = os.open(path, how | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
