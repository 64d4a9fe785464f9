"""What `farm dataset` shows: words and bars for people, lines of JSON for machines."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.cli.follow import Pace, bars, sentence, tell_unserved
from farm.cli.output import (
    about,
    clean,
    duration,
    hint,
    live,
    note,
    plural,
    print_fields,
    print_line,
    short,
)
from farm.errors import EnvironmentFault
from farm.units import show_size

if TYPE_CHECKING:
    from farm.datasets.batches import Tell
    from farm.datasets.diff import Diff
    from farm.datasets.manifest import Verdict
    from farm.datasets.plan import Plan
    from farm.datasets.run import Summary
    from farm.datasets.stats import File
    from farm.datasets.status import Status
    from farm.service import Farm
    from farm.store.batches import BatchStatus

QUIET_S = 10.0  # between two lines of progress where there is no terminal
REFRESH_S = 1.0  # between two looks at a batch while its shards are written
SHOWN = 20


def command(what: str, file: Path, label: str = "") -> str:
    """A command line of `farm dataset`, for a person to copy."""
    more = ["--label", label] if label else []
    return shlex.join(["farm", "dataset", what, str(file), *more])


@contextlib.contextmanager
def telling(farm: Farm, as_json: bool) -> Iterator[Tell]:
    """Bars on a terminal, else a line now and then; with `as_json` also JSON on standard output."""
    if as_json:
        yield Lines(farm)
    elif live(sys.stderr):
        with bars() as progress:
            yield _Bars(farm, progress)
    else:
        yield _Words(farm)


class _Words:
    """A line on standard error now and then."""

    def __init__(self, farm: Farm) -> None:
        self._farm, self._pace = farm, Pace()
        self._said, self._trouble = 0.0, ""

    def queued(self, total: int) -> None:
        pass

    def batch(self, status: BatchStatus) -> None:
        note(f"{plural(status.total, 'row')} in batch {status.id}")
        if status.paused:
            hint(f"it is paused: farm resume {status.id}")
        if not status.done:
            with contextlib.suppress(EnvironmentFault):
                tell_unserved(self._farm, list(status.by_model))

    def waits(self, status: BatchStatus) -> None:
        now = time.monotonic()
        rate = self._pace.rate(status, now)
        if now - self._said >= QUIET_S:
            self._said = now
            note(f"{status.id}  {sentence(status, rate)}")

    def shard(self, shard: int, shards: int, written: bool) -> None:
        note(f"shard {shard + 1:,} of {shards:,} {'written' if written else 'is whole'}")

    def trouble(self, text: str) -> None:
        note(clean(text))


class _Bars(_Words):
    """A bar for the rows, one for the shards."""

    def __init__(self, farm: Farm, progress: Any) -> None:
        super().__init__(farm)
        self._progress = progress
        self._rows = progress.add_task("rows", total=None, told="")
        self._shards = progress.add_task("shards", total=None, told="")

    def queued(self, total: int) -> None:
        self._progress.update(self._rows, total=total, told="queued")

    def batch(self, status: BatchStatus) -> None:
        super().batch(status)
        self._show(status, None)

    def waits(self, status: BatchStatus) -> None:
        self._show(status, self._pace.rate(status, time.monotonic()))

    def _show(self, status: BatchStatus, rate: float | None) -> None:
        self._batch, self._shown = status.id, time.monotonic()
        told = sentence(status, rate).partition(" done")[2].lstrip(", ")
        done = status.total - status.open
        self._progress.update(self._rows, total=status.total, completed=done, told=told)

    def shard(self, shard: int, shards: int, written: bool) -> None:
        told = "" if written else "were whole"
        if shard + 1 == shards or time.monotonic() - self._shown > REFRESH_S:
            with contextlib.suppress(EnvironmentFault):
                self._show(self._farm.status(self._batch), None)
        self._progress.update(self._shards, total=shards, completed=shard + 1, told=told)


class Lines(_Words):
    """An object a line on standard output: the batch, each shard."""

    @staticmethod
    def print(value: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()

    def batch(self, status: BatchStatus) -> None:
        super().batch(status)
        self.print({"batch": status.id, "rows": status.total})

    def shard(self, shard: int, shards: int, written: bool) -> None:
        self.print({"shard": shard, "shards": shards, "written": written})


def tell_summary(told: Summary, file: Path) -> None:
    """Two lines on a run that is over, and what to do if rows failed."""
    counts = ", ".join(f"{n:,} {state}" for state, n in told.counts.items() if n)
    note(f"{told.name}: {plural(told.rows, 'row')}: {counts}, in {duration(told.seconds)}")
    if told.refused:
        gates = ", ".join(f"{n:,} by {gate}" for gate, n in told.refused.items())
        note(f"rejected: {gates}; stats/ in the dataset tells why, row by row")
    note(
        f"{told.rendered:,} rendered now, {told.reused:,} before; {plural(told.shards, 'shard')}, "
        f"{told.written:,} written, {show_size(told.bytes)} of pictures"
    )
    if not told.whole:
        again = command("redrive", file, told.label)
        hint(f"why: farm status {told.batch}; again: {again}")


def show_plan(told: Plan) -> None:
    """A plan, its samples below."""
    models = ", ".join(f"{n:,} of {model}" for model, n in sorted(told.by_model.items()))
    time_told = "nothing is left to render"
    if told.to_render:
        time_told = f"unknown: nothing of {', '.join(told.by_model)} was rendered here yet"
        if told.seconds is not None:
            time_told = f"{about(told.seconds)} with the workers of now"
    print_fields(
        [
            ("dataset", f"{told.name} {told.label}".strip()),
            ("rows", f"{told.rows:,}: {models}"),
            ("shards", f"{told.shards:,}, as {', '.join(told.formats)}"),
            ("to", told.out),
            ("rendered before", f"{told.reused:,} of {told.rows:,}"),
            ("to render", f"{told.to_render:,}"),
            ("failed", f"{told.failed:,}: farm dataset redrive" if told.failed else None),
            ("time", time_told),
            ("pictures", f"about {show_size(told.size_bytes)}" if told.size_bytes else None),
            ("batch", told.batch),
        ]
    )
    if told.unknown:
        served = ", ".join(told.unknown)
        hint(f"what was rendered of {served} is known once a worker has served it on this farm")
    for sample in told.samples:
        more = {k: v for k, v in sample.items() if k not in ("prompt", "model") and v}
        shown = ", ".join(f"{name} {clean(value)}" for name, value in more.items())
        print_line(f"  {short(sample['prompt'], 70)}  ({shown})")


def show_status(told: Status, file: Path, label: str) -> None:
    """How far a run is."""
    batch = told.batch
    counts = ", ".join(f"{n:,} {state}" for state, n in told.counts.items() if n)
    failures = ", ".join(f"{n:,} {code}" for code, n in told.failures.items())
    print_fields(
        [
            ("dataset", f"{told.name} {told.label}".strip()),
            ("batch", batch.id if batch else "none: it was never run"),
            ("rows", sentence(batch, batch.rate) if batch else None),
            ("failed", failures),
            ("shards", f"{told.stats:,} of {told.shards:,} written" if batch else None),
            ("dataset holds", counts),
            ("finished", "yes" if told.finished else "no"),
            ("to", told.out),
        ]
    )
    if batch is None:
        return
    lost = told.counts if told.finished else {"cancelled": batch.counts["cancelled"]}
    if lost.get("failed") or lost.get("cancelled"):
        hint(f"failed and cancelled rows again: {command('redrive', file, label)}")
    elif not told.finished:
        hint(f"go on: {command('run', file, label)}")


def show_verdict(told: Verdict) -> None:
    """What is wrong with a dataset, on standard output; the sum beside it."""
    for one in told.wrong:
        print_line(f"{clean(one['key'])}  {one['fault']}")
    for key in told.extra[:SHOWN]:
        note(f"{clean(key)} belongs to no shard")
    sum_told = f"{plural(told.files, 'file')}, {show_size(told.bytes)}, {plural(told.rows, 'row')}"
    if told.wrong:
        note(f"{told.name}: {plural(len(told.wrong), 'file')} wrong, of {sum_told}")
        hint("run its recipe again, a copy: publish it again; what is not whole is written anew")
    else:
        note(f"{told.name}: all right, {sum_told}")


def show_diff(found: Diff) -> None:
    """Counts, and the first rows of each kind."""
    for what in ("same", "changed", "added", "removed"):
        n, rows = getattr(found, what), found.rows.get(what, [])[:SHOWN]
        shown = ", ".join(map(str, rows)) + (" ..." if n > len(rows) else "")
        print_line(f"{what:8} {n:>9,}" + (f"  rows {shown}" if rows else ""))


class Copied:
    """How many files of a dataset were copied; a bar on a terminal."""

    def __init__(self, progress: Any = None) -> None:
        self.copied = self.kept = self.bytes = 0
        self._progress = progress
        self._task = progress and progress.add_task("files", total=None, told="")

    def __call__(self, file: File, copied: bool) -> None:
        self.copied, self.kept = self.copied + copied, self.kept + (not copied)
        self.bytes += file.size if copied else 0
        if self._progress:
            self._progress.update(self._task, advance=1, told=show_size(self.bytes))

    def as_dict(self) -> dict[str, int]:
        return {"copied": self.copied, "kept": self.kept, "bytes": self.bytes}


@contextlib.contextmanager
def copying() -> Iterator[Copied]:
    """Counts what is copied."""
    if not live(sys.stderr):
        yield Copied()
        return
    with bars() as progress:
        yield Copied(progress)
