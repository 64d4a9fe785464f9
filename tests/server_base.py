"""One server process of a test: started, asked whether it is ready, stopped, erased."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, ClassVar, Self

import psutil

PREFIX = "farm-t-"
START_S = 60.0  # a start that takes longer has failed
STOP_S = 15.0

# Runs between fork and exec: gives up root if asked to, ties the server's life to its parent's,
# then becomes the server. argv: parent, signal at the parent's death, user id or -1, command...
_LAUNCH = """
import ctypes, os, sys
parent, signum, user = map(int, sys.argv[1:4])
if user >= 0:
    os.setgroups([]); os.setgid(user); os.setuid(user)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signum)
    if os.getppid() != parent:
        os._exit(1)
os.execv(sys.argv[4], sys.argv[4:])
"""


class ServerMissing(RuntimeError):
    """The server's program is not installed here."""


class ServerFailed(RuntimeError):
    """The server did not start; the message ends with its log."""


@functools.cache
def _spawner(pid: int) -> ThreadPoolExecutor:
    """The thread that forks: Linux kills a child when the *thread* that forked it ends."""
    return ThreadPoolExecutor(1, f"server-spawner-{pid}")


def spawn(
    argv: Sequence[str | Path],
    log: IO[bytes],
    *,
    at_parents_death: signal.Signals = signal.SIGKILL,
    user: int = -1,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that gets `at_parents_death` when this process ends, however it ends."""
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH]
    facts = [str(os.getpid()), str(int(at_parents_death)), str(user)]
    start: Callable[[], subprocess.Popen[bytes]] = lambda: subprocess.Popen(  # noqa: E731
        [*launch, *facts, *map(str, argv)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=cwd,
        start_new_session=True,  # Ctrl-C is for pytest, which then stops its servers in order
    )
    return _spawner(os.getpid()).submit(start).result()


def poll(ready: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Ask again and again until `ready()`; raises TimeoutError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took longer than {timeout_s:g} s")
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    """Also if whoever adopted it has not collected it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Server(ABC):
    """One server process with its directory; a context manager."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    death_signal: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._find()
        self.dir, self._lock = _temporary_directory()

    @abstractmethod
    def _find(self) -> None:
        """Look for the program. Raises ServerMissing."""

    @abstractmethod
    def _argv(self) -> list[str | Path]: ...

    @abstractmethod
    def _ready(self) -> bool: ...

    def _user(self) -> int:
        return -1

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it is stopped."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process else None

    def start(self) -> None:
        """Start on the same data and address, and wait until it answers. Raises ServerFailed."""
        if self.pid is not None:
            return
        with (self.dir / "log").open("ab") as log:
            self._process = process = spawn(
                self._argv(),
                log,
                at_parents_death=self.death_signal,
                user=self._user(),
                cwd=self.dir,
            )
        try:
            poll(lambda: process.poll() is not None or self._ready(), f"starting {self.name}")
            if process.poll() is None:
                return
            reason = f"{self.name} ended with {process.returncode} instead of starting"
        except TimeoutError as exc:
            reason = str(exc)
            self.kill()
        raise ServerFailed(f"{reason}\n{self.log()[-2000:]}")

    def stop(self) -> None:
        """Ask the server to end and wait for it; kill it should it not."""
        if self._process is None or self.pid is None:
            return
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, as when the machine fails; what was written stays for the next `start`."""
        if self._process is not None and self.pid is not None:
            self._process.kill()
            self._process.wait(STOP_S)

    def close(self) -> None:
        """Stop the server and erase its directory."""
        self.stop()
        shutil.rmtree(self.dir, ignore_errors=True)
        self._lock.close()

    def log(self) -> str:
        """What the server wrote so far."""
        with suppress(FileNotFoundError):
            return (self.dir / "log").read_text(errors="replace")
        return ""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _temporary_directory() -> tuple[Path, IO[bytes]]:
    """A new short directory and the lock that marks it as in use; sweeps those of the dead."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > 60:  # a unix socket's path has at most 100 bytes or so
        base = Path("/tmp")
    for old in base.glob(f"{PREFIX}*/lock"):
        with suppress(OSError), old.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    # Locked under another name first: a sweep may pass between open and flock.
    fresh = (directory / "lock.new").open("wb")
    fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (directory / "lock.new").rename(directory / "lock")
    return directory, fresh
