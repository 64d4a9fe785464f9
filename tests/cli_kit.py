"""The command line in this process, on a home of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farm.cli import main
from farm.cli.context import use

Run = Callable[..., tuple[int, str, str]]


@contextmanager
def command_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a command: its exit code, output and errors. No setting is inherited."""
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FARM_HOME", str(home))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    yield call
    root.handlers[:], root.level = handlers, level
    use(None, 0, False)
