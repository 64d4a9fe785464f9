"""The engine's own process, seen from inside: read orders in a thread, render in the main thread.

It dies with its parent in every case. The reading thread ends it when the pipe breaks; should
native code hold Python's lock then, the kernel does, by a signal that the closed lifeline raises.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import NoReturn

import numpy as np

from farm.errors import (
    BadImage,
    EngineCrashed,
    EngineFault,
    FarmError,
    InvalidConfig,
    InvalidParameter,
    JobCancelled,
    ModelNotLoaded,
    OutOfMemory,
    RenderFailed,
    by_code,
)
from farm.spec import JobSpec
from farm.units import show_size
from workers.engine import Engine, EngineConfig, EngineInfo, Pixels, create, said
from workers.ladder import Ladder, check_need
from workers.messages import (
    Broken,
    Bundle,
    Cancel,
    Close,
    End,
    Fault,
    GivenBack,
    Message,
    Progress,
    Ready,
    Shipped,
    Started,
    StopAfterCurrent,
)

PROGRESS_PERIOD_S = 0.2
TOGETHER_BYTES = 2**20
"""Pixels of a micro-batch that cross the pipe at once."""
GAVE_UP = 70
"""Exit status after a Broken: the model did not load, or its device is unusable."""

Outcome = Sequence[Pixels | FarmError] | FarmError


def main(
    orders: Connection,
    events: Connection,
    lifeline: Connection,
    config: EngineConfig,
    log: Path | None,
) -> None:
    """The child's life: load, then bundle after bundle until told to close."""
    _settle_in(lifeline, log)
    inbox = Inbox(orders)
    threading.Thread(target=inbox.read, name="orders", daemon=True).start()
    outbox = Outbox(events)
    engine, info = _load(config, outbox)
    outbox.send(Ready(info))
    ladder = Ladder(engine, config, info.micro_batch, outbox.send)
    while bundle := inbox.bundles.get():
        BundleRun(engine, ladder, config.strict, inbox, outbox, bundle).run()
        outbox.send(End(bundle.number))
    engine.close()


def _settle_in(lifeline: Connection, log: Path | None) -> None:
    for interruption in (signal.SIGINT, signal.SIGTERM):  # meant for the worker, which decides
        signal.signal(interruption, signal.SIG_IGN)
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
    faulthandler.enable(all_threads=False)
    if sys.platform == "linux":  # SIGIO ends a process, and a pipe raises it when it is closed
        fcntl.fcntl(lifeline.fileno(), fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(lifeline.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(lifeline.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)


def _limit(config: EngineConfig, error: Exception) -> str:
    """What to do about a lack of memory while a model is loaded."""
    if config.memory_limit is None or not isinstance(error, MemoryError):
        return ""
    return f"; it does not load within --memory-limit {show_size(config.memory_limit)}: raise it"


def _load(config: EngineConfig, outbox: Outbox) -> tuple[Engine, EngineInfo]:
    """The engine, loaded; a failure is sent, and ends the process."""
    try:
        check_need(config, config.memory_limit)
        engine = create(config)
        info = engine.load()
        check_need(config, info.memory)
        return engine, info
    except (ModelNotLoaded, InvalidConfig) as error:
        failure: FarmError = error
    except Exception as error:
        traceback.print_exc()
        failure = ModelNotLoaded(f"model {config.model}: {said(error)}{_limit(config, error)}")
    outbox.give_up(failure)


class Outbox:
    """What goes to the parent; there is nothing left to do when it cannot be reached."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, message: Message, pixels: Sequence[Pixels] = ()) -> None:
        try:
            self._pipe.send(message)
            if pixels:
                whole = pixels[0] if len(pixels) == 1 else np.stack(pixels)
                self._pipe.send_bytes(np.ascontiguousarray(whole).data.cast("B"))
        except OSError:
            os._exit(0)

    def give_up(self, failure: FarmError) -> NoReturn:
        """Say why, and end the process."""
        self.send(Broken(failure.code, failure.message))
        os._exit(GAVE_UP)


class Inbox:
    """The orders, as the reading thread found them; None in `bundles` means to close."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.bundles: queue.SimpleQueue[Bundle | None] = queue.SimpleQueue()
        self._cancelled: dict[int, frozenset[int]] = {}
        self._stopped = 0

    def read(self) -> None:
        while True:
            try:
                order = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone
            if isinstance(order, Bundle):
                self.bundles.put(order)
            elif isinstance(order, Cancel):
                before = self._cancelled.get(order.bundle, frozenset())
                self._cancelled = {order.bundle: before | order.ids}
            elif isinstance(order, StopAfterCurrent):
                self._stopped = order.bundle
            elif isinstance(order, Close):
                self.bundles.put(None)

    def cancelled(self, bundle: int) -> frozenset[int]:
        return self._cancelled.get(bundle, frozenset())

    def stopped(self, bundle: int) -> bool:
        return self._stopped >= bundle


class BundleRun:
    """One bundle: micro-batch after micro-batch, each job to its one end."""

    def __init__(
        self,
        engine: Engine,
        ladder: Ladder,
        strict: bool,
        inbox: Inbox,
        outbox: Outbox,
        bundle: Bundle,
    ) -> None:
        self._engine, self._ladder, self._strict = engine, ladder, strict
        self._inbox, self._outbox, self._bundle = inbox, outbox, bundle
        self._waiting = deque(n for n in range(len(bundle.specs)) if n not in bundle.done)
        self._alone: set[int] = set()  # one of these spoilt a micro-batch
        self._ids: tuple[int, ...] = ()  # the micro-batch under way
        self._begun, self._reported = 0.0, 0.0

    def run(self) -> None:
        while self._waiting:
            if self._inbox.stopped(self._bundle.number):
                for job in self._waiting:
                    self._outbox.send(GivenBack(job))
                break
            if ids := self._next_ids():
                self._micro_batch(ids)

    def step(self, done: int, total: int) -> None:
        """Watch.step of the micro-batch under way."""
        if self._cancelled().issuperset(self._ids):
            raise JobCancelled
        now = monotonic()
        ends_slow_steps = done >= total and self._reported > self._begun
        if ends_slow_steps or now - self._reported >= PROGRESS_PERIOD_S:
            self._reported = now
            self._outbox.send(Progress(self._ids, min(1.0, done / max(1, total))))

    def _cancelled(self) -> frozenset[int]:
        return self._inbox.cancelled(self._bundle.number)

    def _next_ids(self) -> tuple[int, ...]:
        """The next jobs to share a micro-batch; those cancelled meanwhile end here."""
        ids: list[int] = []
        while self._waiting and len(ids) < self._ladder.cap:
            job = self._waiting[0]
            if ids and (job in self._alone or ids[0] in self._alone):
                break
            self._waiting.popleft()
            if job in self._cancelled():
                self._fail(job, JobCancelled())
            else:
                ids.append(job)
        return tuple(ids)

    def _micro_batch(self, ids: tuple[int, ...]) -> None:
        specs = [self._bundle.specs[job] for job in ids]
        if refusal := self._ladder.refusal(specs[0]):
            self._fail_all(ids, refusal)
            return
        self._ids, self._begun = ids, monotonic()
        self._reported = self._begun
        self._outbox.send(Started(ids))
        if self._strict:
            specs += specs[-1:] * (self._ladder.cap - len(specs))
        outcome = self._attempt(specs)
        seconds = (monotonic() - self._begun) / len(ids)
        if isinstance(outcome, OutOfMemory):
            self._too_much(ids, specs, outcome)
            return
        if isinstance(outcome, FarmError):
            self._spoilt(ids, outcome)
            return
        self._ladder.rendered(specs[0])
        self._settle(dict(zip(ids, outcome, strict=False)), seconds, len(specs))

    def _attempt(self, specs: Sequence[JobSpec]) -> Outcome:
        """The engine's answer. An exception ends here, with all that its frames held."""
        try:
            outcome = self._engine.render(specs, self, self._bundle.inputs)
            if len(outcome) != len(specs):
                raise RuntimeError(f"{len(outcome)} pictures for {len(specs)} jobs")
            return outcome
        except OutOfMemory as error:
            return OutOfMemory(error.message)
        except MemoryError as error:
            return OutOfMemory(said(error))
        except EngineFault as error:
            self._outbox.give_up(error)
        except FarmError as error:
            return by_code(error.code, error.message)
        except Exception as error:
            traceback.print_exc()
            return RenderFailed(said(error))

    def _spoilt(self, ids: tuple[int, ...], error: FarmError) -> None:
        """Not one picture came: try each job alone, or name the error."""
        if len(ids) > 1 and not isinstance(error, JobCancelled):
            self._alone.update(ids)
            self._waiting.extendleft(reversed(ids))
        else:
            self._fail_all(ids, error)

    def _too_much(self, ids: tuple[int, ...], specs: Sequence[JobSpec], error: OutOfMemory) -> None:
        """The memory did not suffice: try again with less, as long as there is a way."""
        gc.collect()
        try:
            again = self._ladder.descend(specs[0], len(specs))
        except Exception as failure:
            traceback.print_exc()
            self._outbox.give_up(EngineCrashed(f"no way to use less memory: {said(failure)}"))
        if again:
            self._waiting.extendleft(reversed(ids))
        else:
            self._fail_all(ids, self._ladder.last_word(specs[0], error))

    def _settle(self, results: dict[int, Pixels | FarmError], seconds: float, batch: int) -> None:
        pictures: dict[int, Pixels] = {}
        cancelled = self._cancelled()
        for job, result in results.items():
            if job in cancelled:
                result = JobCancelled()
            elif not isinstance(result, FarmError):
                result = _checked(result, self._bundle.specs[job])
            if isinstance(result, FarmError):
                self._fail(job, result)
            else:
                pictures[job] = result
        ids = list(pictures)
        while ids:  # small ones travel together, large ones are not copied for it
            few = max(1, TOGETHER_BYTES // pictures[ids[0]].nbytes)
            now, ids = ids[:few], ids[few:]
            some = [pictures[job] for job in now]
            height, width, colours = some[0].shape
            self._outbox.send(Shipped(tuple(now), seconds, batch, (height, width, colours)), some)

    def _fail_all(self, ids: tuple[int, ...], error: FarmError) -> None:
        for job in ids:
            self._fail(job, error)

    def _fail(self, job: int, error: FarmError) -> None:
        self._outbox.send(Fault(job, error.code, error.message))


def _checked(pixels: Pixels, spec: JobSpec) -> Pixels | FarmError:
    if pixels.shape != (spec.height, spec.width, 3) or pixels.dtype != np.uint8:
        height, width = pixels.shape[:2]
        return InvalidParameter(
            f"size {spec.width}x{spec.height}: the model gives {width}x{height} instead"
        )
    if pixels.min() == pixels.max():
        return BadImage(f"all pixels have the same value, {pixels.min()}")
    return pixels
