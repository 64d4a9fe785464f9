"""Following batches until they are done: bars on a terminal, a line a change elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from farm.cli.output import about, clean, console, duration, hint, live, note, pace, plural, short
from farm.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from farm.service import Farm
    from farm.store.batches import BatchStatus
    from farm.store.sessions import Worker

POLL_S = 0.25
AWAY_S = 2.0
_WINDOW_S = 60.0


class Pace:
    """Pictures a second over the last minute that this process saw, else the batch's own rate."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, status: BatchStatus, at: float) -> float | None:
        """Take note of the status seen at `at` (seconds, monotonic); the rate now."""
        finished = status.counts["succeeded"] + status.counts["failed"]
        self._seen.append((at, finished))
        while at - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        since, before = self._seen[0]
        if at - since >= 2 and finished > before:
            return (finished - before) / (at - since)
        return status.rate


def sentence(status: BatchStatus, rate: float | None) -> str:
    """`40 of 120 done, 2 failed, 3.1/s, about 26 s to go`."""
    done = status.total - status.open
    parts = [f"{done:,} of {status.total:,} done"]
    parts += [f"{status.counts[s]:,} {s}" for s in ("failed", "cancelled") if status.counts[s]]
    if status.paused and not status.done:
        parts.append("paused")
    elif status.open and rate:
        parts += [pace(rate), f"{about(status.open / rate)} to go"]
    return ", ".join(parts)


class Display(Protocol):
    """Shows what `follow` sees."""

    def show(self, status: BatchStatus, rate: float | None) -> None: ...


class Lines:
    """One line whenever a batch changed."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def show(self, status: BatchStatus, rate: float | None) -> None:
        state = (status.counts, status.paused)
        if self._last.get(status.id) != state:
            self._last[status.id] = state
            note(f"{status.id}  {sentence(status, rate)}")


class JsonLines(Lines):
    """One JSON object on standard output whenever a batch changed."""

    def show(self, status: BatchStatus, rate: float | None) -> None:
        state = (status.counts, status.paused)
        if self._last.get(status.id) != state:
            self._last[status.id] = state
            sys.stdout.write(_json_line(status))
            sys.stdout.flush()


def _json_line(status: BatchStatus) -> str:
    import json

    return json.dumps(status.as_dict(), ensure_ascii=False) + "\n"


class Bars:
    """A bar a batch, with count, rate and time to go."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def show(self, status: BatchStatus, rate: float | None) -> None:
        if status.id not in self._tasks:
            title = clean(status.name)[:30] or status.id
            self._tasks[status.id] = self._progress.add_task(title, total=status.total, told="")
        done = status.total - status.open
        told = sentence(status, rate).partition(" done")[2].lstrip(", ")
        told = told or ("done" if status.done else "")
        task = self._tasks[status.id]
        self._progress.update(task, completed=done, total=status.total, told=told)


@contextlib.contextmanager
def bars(counted: str = "") -> Iterator[Any]:
    """A rich progress display on standard error; a task has the field `told`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(f"{counted}{{task.fields[told]}}", markup=False),
    )
    with Progress(*columns, console=console(sys.stderr)) as progress:
        yield progress


@contextlib.contextmanager
def _display(as_json: bool) -> Iterator[Display]:
    if as_json:
        yield JsonLines()
    elif live(sys.stderr):
        with bars() as progress:
            yield Bars(progress)
    else:
        yield Lines()


def follow(farm: Farm, batch_ids: Sequence[str], *, json_lines: bool = False) -> list[BatchStatus]:
    """Show the batches until all are done; their last status. Waits while the database is away."""
    last: dict[str, BatchStatus] = {}
    paces = {batch_id: Pace() for batch_id in batch_ids}
    with _display(json_lines) as display:
        while True:
            for batch_id in batch_ids:
                if batch_id not in last or not last[batch_id].done:
                    last[batch_id] = status = _status(farm, batch_id)
                    display.show(status, paces[batch_id].rate(status, time.monotonic()))
            if all(status.done for status in last.values()):
                return [last[batch_id] for batch_id in batch_ids]
            time.sleep(POLL_S)


def _status(farm: Farm, batch_id: str) -> BatchStatus:
    told = False
    while True:
        try:
            return farm.status(batch_id)
        except DatabaseUnavailable as error:
            if not told:
                note(f"{clean(error.message)}; waiting until it is back")
            told = True
            time.sleep(AWAY_S)


def download(farm: Farm, status: BatchStatus, directory: Any) -> int:
    """Fetch the batch's pictures with a bar on a terminal; how many."""
    if not live(sys.stderr):
        return farm.download(status.id, directory)
    with bars("fetched") as progress:
        task = progress.add_task("pictures", total=status.counts["succeeded"], told="")
        advance: Callable[[Any], None] = lambda path: progress.advance(task)  # noqa: E731
        return farm.download(status.id, directory, advance)


def summary(status: BatchStatus) -> str:
    """One sentence on a batch that is done."""
    parts = [
        f"{plural(status.counts[s], 'job') if not i else f'{status.counts[s]:,}'} {s}"
        for i, s in enumerate(s for s in ("succeeded", "failed", "cancelled") if status.counts[s])
    ]
    took = ""
    if status.started_at and status.finished_at:
        seconds = status.finished_at - status.started_at
        took = f" in {duration(seconds)} ({pace(status.rate)})"
    return f"batch {status.id}: {', '.join(parts) or 'no jobs'}{took}"


def tell_unserved(farm: Farm, models: Sequence[str] | None = None) -> None:
    """Say which models have queued jobs and no worker (of these models only, if given)."""
    resting = [worker for worker in farm.workers() if worker.state == "resting"]
    for lane, n in sorted(farm.unserved().items()):
        model, _, engine = lane.partition(":")
        if models is None or model in models:
            what = f"{model} on {engine}" if engine else model
            advice = f"start one with `{_start(farm, model, engine)}`"
            for worker in resting:
                if worker.model == model and engine in ("", worker.engine):
                    why = short(worker.note, 200)
                    advice = f"worker {clean(worker.host)}:{worker.pid} rests, {why}"
            hint(f"no worker serves {what} now, {plural(n, 'job')} waiting: {advice}")


def tell_held(workers: Sequence[Worker]) -> None:
    """Say how many finished pictures wait for the blob store, and why."""
    holders = sorted((w for w in workers if w.spooled), key=lambda worker: worker.spooled)
    if holders:
        held = plural(sum(worker.spooled for worker in holders), "finished picture")
        hold = "worker holds" if len(holders) == 1 else "workers hold"
        hint(f"{len(holders)} {hold} {held}: {short(holders[-1].note, 300)}")


def _start(farm: Farm, model: str, engine: str) -> str:
    """The command that brings a worker for a lane: beside a farm that is up, or with a new one."""
    if farm.settings.broker_url or farm.settings.broker_socket.exists():
        entry = farm.catalog.models.get(model)
        engine = engine or (next(iter(entry.engines)) if entry else "E")
        return f"farm worker --model {model} --engine {engine}"
    if engine:
        return f"farm up --model {model}:{engine}"
    return "farm up" if model == "shapes" else f"farm up --model {model}"
