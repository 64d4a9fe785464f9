"""What is told of an engine's process that died or was ended: how, when, and its last words."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from farm.errors import EngineCrashed, EngineFault, EngineHung, EngineKilled

MOST_BYTES = 16 * 2**20
"""Of the log of an engine that talks for weeks."""
LAST_WORDS = 6
"""Lines of the log that come with the news of a child's death."""


class Phase(NamedTuple):
    """What an engine does, how long it may be silent in it, and the setting that says so."""

    when: str
    limit_s: float
    setting: str

    def hung(self, pid: int | None, how: str) -> EngineHung:
        return EngineHung(
            f"the engine (process {pid}) {how} for {self.limit_s:g} s {self.when}, "
            f"the most that {self.setting} allows"
        )

    def died(self, status: int | None, last_words: str) -> EngineFault:
        """`status`: as multiprocessing tells it, a signal's number below zero."""
        if status == -signal.SIGKILL:
            return EngineKilled(
                f"the engine's process was killed by SIGKILL {self.when}: by the kernel, when "
                f"memory runs out (see dmesg), or by a person{last_words}"
            )
        how = f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        return EngineCrashed(f"the engine's process {how} {self.when}{last_words}")


class Log:
    """The file that takes the output of one process after the other, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._from = 0

    def begin(self) -> None:
        """What comes from now on is the next process'."""
        self._from = self.path.stat().st_size if self.path and self.path.exists() else 0

    def trim(self) -> None:
        """Empty a file that has grown too large; whoever writes appends, and goes on in it."""
        with suppress(OSError):
            if self.path and self.path.stat().st_size > MOST_BYTES:
                os.truncate(self.path, 0)
                self._from = 0

    def last_words(self) -> str:
        """To be put behind a sentence; empty when it said nothing."""
        if not self.path or not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._from, size - 8192))
            text = file.read().decode(errors="replace")
        lines = [line.strip()[:200] for line in text.split("\n") if line.strip()]
        fatal = [i for i, line in enumerate(lines) if line.startswith("Fatal Python error")]
        if fatal:  # what native code said stands above Python's own report
            lines = lines[: fatal[-1] + LAST_WORDS // 2]
        return "; its last words: " + " | ".join(lines[-LAST_WORDS:]) if lines else ""
