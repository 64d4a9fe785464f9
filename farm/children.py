"""Child processes that do not outlive this one, with their logs and their past; how a worker is \
started."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from farm.catalog import Lane
from farm.config import Settings

_LOG_LINES = 12
_MAX_LOG = 8 * 2**20  # bytes; a longer log is put aside when its process starts
_EMBEDDED = ("database_url", "broker_url", "blobs_url")  # an empty one overrules farm.toml

# Between fork and the real program: Linux shall kill it when its parent dies, however that dies.
# argv: parent's pid, signal, program, its arguments.
_LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


@functools.cache
def _spawner(pid: int) -> ThreadPoolExecutor:
    """The thread that forks: Linux kills the child when the *thread* that forked it ends."""
    return ThreadPoolExecutor(1, f"spawner-{pid}")


def spawn(
    argv: Sequence[str | Path], log: Path | None, *, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that writes to `log` (None: where this one writes) and dies with this \
process (elsewhere than on Linux: not when this one is killed). Ctrl-C does not reach it."""
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(int(signal.SIGKILL))]

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") if log else nullcontext() as out:
            return subprocess.Popen(
                [*launch, *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )

    begin: Callable[[], subprocess.Popen[bytes]] = start
    return _spawner(os.getpid()).submit(begin).result()


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment in which a child has exactly these settings."""
    env = dict(os.environ)
    for name in settings.model_fields_set | {"home"}:
        value = getattr(settings, name)
        if value is None and name not in _EMBEDDED:
            env.pop(f"FARM_{name.upper()}", None)
            continue
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if isinstance(value, Path):
            value = value.resolve()
        env[f"FARM_{name.upper()}"] = "" if value is None else _plain(value)
    return env


@dataclass(frozen=True)
class WorkerFlags:
    """What a worker is told beside its lane; None: as the model and the engine have it.

    `memory_limit`: bytes.
    """

    device: str | None = None
    micro_batch: int | None = None
    strict: bool = False
    threads: int | None = None
    memory_limit: int | None = None


def worker_command(lane: Lane, flags: WorkerFlags) -> list[str]:
    """The command line of a worker; `farm` itself knows it by its name alone."""
    argv = [sys.executable, "-m", "workers", "--model", lane.model, "--engine", lane.engine]
    limit = None if flags.memory_limit is None else f"{flags.memory_limit}B"
    told = {
        "device": flags.device, "micro-batch": flags.micro_batch, "threads": flags.threads,
        "memory-limit": limit,
    }  # fmt: skip
    for name, value in told.items():
        if value is not None:
            argv += [f"--{name}", str(value)]
    return [*argv, "--strict"] if flags.strict else argv


def _plain(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


@dataclass
class Child:
    """One supervised process and its past."""

    name: str
    argv: Sequence[str | Path]
    log: Path
    lane: Lane | None = None
    process: subprocess.Popen[bytes] | None = None
    born: float = 0.0
    log_start: int = 0
    deaths: int = 0
    next_start: float = 0.0
    given_up: bool = False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, env: dict[str, str]) -> None:
        size = self.log.stat().st_size if self.log.exists() else 0
        if size > _MAX_LOG:
            self.log.replace(f"{self.log}.1")
            size = 0
        self.log_start = size
        self.born = time.monotonic()
        self.process = spawn(self.argv, self.log, env=env)

    def signal(self, signum: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)

    def last_words(self) -> str:
        """The end of what it wrote since its last start."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self.log_start, self.log.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(f"  {line}" for line in text.rstrip().splitlines()[-_LOG_LINES:])

    def obituary(self) -> str:
        """Its name and how it ended."""
        code = self.process.returncode if self.process else None
        if code is not None and code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"
