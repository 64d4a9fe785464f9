"""`farm up` as a person runs it, ended always."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from tests.servers import poll

START_S = 60.0


class Up:
    """`farm up` in a session of its own; its models are those of home/models.toml."""

    def __init__(self, home: Path, *args: str, **settings: object) -> None:
        self.home = home
        self.log = home.parent / "up.log"
        env = {k: v for k, v in os.environ.items() if not k.startswith("FARM_")}
        env |= {f"FARM_{name.upper()}": str(value) for name, value in settings.items()}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "farm", "--home", str(home), "up", *args],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=env | {"FARM_MODELS_FILE": str(home / "models.toml")},
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until_ready(self, timeout_s: float = START_S) -> Up:
        poll(lambda: "ready; " in self.text() or self.over(), "farm up", timeout_s)
        assert not self.over(), self.text()
        return self

    def over(self) -> bool:
        return self.process.poll() is not None

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, words: str) -> psutil.Process:
        """The child of `farm up` itself that was started with these words."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if words in " ".join(child.cmdline()):
                    return child
        raise LookupError(words)

    def has(self, words: str, old: int) -> bool:
        with suppress(LookupError, psutil.NoSuchProcess):
            return self.child(words).pid != old
        return False

    def end(self) -> None:
        """Kill it and all that it started."""
        if not self.over():
            left = self.children()
            self.process.kill()
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.wait(30)
