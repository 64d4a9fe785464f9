"""A bar of bytes on a terminal: total, rate and time to go. Elsewhere nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from farm.cli.output import console, live
from farm.cli.weights import lane_title
from farm.models.fetch import Progress

if TYPE_CHECKING:
    from farm.catalog import Lane


class Bar(Progress):
    """One task a lane. `progress`: rich's, whose methods may be called from any thread."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, None

    def start(self, lane: Lane, total: int | None, have: int) -> None:
        self._task = self._progress.add_task(lane_title(lane), total=total, completed=have)

    def advance(self, n: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, n)


@contextlib.contextmanager
def transfer_bar() -> Iterator[Progress]:
    """A bar on standard error while it is a terminal; it draws nothing before the first start."""
    if not live(sys.stderr):
        yield Progress()
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=28),
        rich.DownloadColumn(binary_units=False),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console(sys.stderr)) as progress:
        yield Bar(progress)
