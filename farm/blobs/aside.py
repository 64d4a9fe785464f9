"""Folders for files that are not whole yet. What a killed process left goes with the next one.

Whoever uses a folder holds a lock on a file in it, which ends with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD_S = 24 * 3600  # where no lock tells whether a folder is in use, its age does
_LOCK = ".lock"


@contextmanager
def aside(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, gone at the end with what is in it. Raises OSError."""
    own = f"{prefix}{_host()}-"
    _remove_left(parent, prefix, own)
    while True:
        with (
            tempfile.TemporaryDirectory(prefix=own, dir=parent) as name,
            _locked(Path(name), os.O_CREAT) as free,
        ):
            folder = Path(name)
            if free is False or not (folder / _LOCK).exists():
                continue  # it was taken for left over before it was locked
            yield folder
            return


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode(errors="replace")).hexdigest()[:12]


def _remove_left(parent: Path, prefix: str, own: str) -> None:
    """Another host's goes by its age: not every network's disk shows its locks here."""
    for name in os.listdir(parent):
        if not name.startswith(prefix):
            continue
        folder = parent / name
        with suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            old = found.st_mtime < time.time() - OLD_S
            if old or name.startswith(own):
                with _locked(folder) as free:
                    if free or (free is None and old):
                        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[bool | None]:
    """Hold the folder's lock. False: somebody else does. None: there is none, or no disk for it."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | how, 0o600)
    except FileNotFoundError:
        yield None
        return
    try:
        yield _lock(lock)
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
