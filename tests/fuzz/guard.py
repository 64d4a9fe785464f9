"""Watches the file system: nothing is written outside the run's own directory.

Python's audit hooks (PEP 578) see each file that is opened to be written, made, renamed or removed,
and each process that is started; what native code writes is found in the run's directories at the
end: its current directory and HOME stay empty, its temporary directory becomes empty again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {  # event -> how many of its first arguments are paths that it changes
    "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1,
    "os.utime": 1, "os.setxattr": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
    "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip
_RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}


class Guard:
    """`data`: where the farm of the run may write. `cwd` and `person` (HOME) are not for it."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.data, self.cwd = self.home / "data", self.home / "cwd"
        self._person, self._temp = self.home / "person", self.home / "temp"
        self._bad: list[str] = []
        self._on = False
        self.may_run: set[str] = set()  # the only programs that may be started

    def enter(self) -> None:
        """This process's directories are the run's from now on."""
        for path in (self.data, self.cwd, self._person, self._temp):
            path.mkdir(parents=True, exist_ok=True)
        for name in [name for name in os.environ if name.startswith(("FARM_", "XDG_"))]:
            del os.environ[name]
        os.environ |= {"HOME": str(self._person), "TMPDIR": str(self._temp), "COLUMNS": "100"}
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.path.insert(0, os.getcwd())
        os.chdir(self.cwd)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The hook stays for good, as audit hooks do, but sees only what is done within."""
        sys.addaudithook(self._see)
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def taken(self) -> list[str]:
        """What was seen since the last time."""
        found, self._bad = self._bad, []
        return found

    def left(self) -> list[str]:
        """What lies where nothing may, now that the run is over."""
        found = []
        for place in (self.cwd, self._person, self._temp):
            found += [f"was left: {path}" for path in sorted(place.rglob("*"))]
        return found

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITES:
                self._check(event, path)
        elif event in _PATHS:
            for path in args[: _PATHS[event]]:
                self._check(event, path)
        elif event in _RUNS and not (event == "subprocess.Popen" and self.may_run & set(args[1])):
            self._bad.append(f"{event} {args!r}"[:300])

    def _check(self, event: str, given: Any) -> None:
        if isinstance(given, int) or given is None:  # a file that is open already
            return
        path = os.path.realpath(os.fsdecode(given))
        inside = path.startswith(f"{self.home}/") or path == "/dev/null"
        if not inside or path.startswith((f"{self.cwd}/", f"{self._person}/")):
            self._bad.append(f"{event} {path!r}")
