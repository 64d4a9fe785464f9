"""The engine's own process, seen from the worker.

Native code aborts, hangs and runs out of memory. It does so in a spawned child that loads the
model once and stays; the worker sees an exception, and may start a new child. The other side of
the pipe is `workers.child_main`. The worker itself never imports torch.
"""

from __future__ import annotations

import atexit
import fcntl
import multiprocessing
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from time import monotonic

import numpy as np

from farm.errors import (
    EngineCrashed,
    EngineFault,
    InvalidConfig,
    InvalidParameter,
    JobCancelled,
    by_code,
)
from farm.spec import JobSpec, one_key
from workers import child_main
from workers.deaths import Log, Phase
from workers.engine import NO_INPUTS, EngineConfig, EngineInfo, Inputs
from workers.messages import (
    Broken,
    Bundle,
    Cancel,
    Cap,
    Close,
    Eased,
    End,
    Event,
    Failed,
    Fault,
    GivenBack,
    Message,
    Order,
    Progress,
    Ready,
    Rendered,
    Shipped,
    Started,
    StopAfterCurrent,
    TooLarge,
)

CLOSE_TIMEOUT_S = 5.0
PIPE_BYTES = 2**20


class Child:
    """One engine process at a time. `render` and `start` belong to one thread at a time.

    `log`: the file that takes the child's output, its last lines are the evidence of a crash.
    What a lack of memory taught (`workers.ladder`) is kept for the next child. A render that
    cannot be stopped from inside (EngineInfo.interruptible) is cancelled by replacing its process.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        load_timeout_s: float = 900.0,
        step_timeout_s: float = 300.0,
        decode_timeout_s: float = 900.0,
        log: Path | None = None,
    ) -> None:
        self._config = config
        self._loading = Phase("while it loaded the model", load_timeout_s, "load_timeout_s")
        self._stepping = Phase("during a render", step_timeout_s, "step_timeout_s")
        self._decoding = Phase("while it decoded pictures", decode_timeout_s, "decode_timeout_s")
        self._phase = self._stepping
        self._reading_since: float | None = None  # a message, monotonic
        self._sending_since: float | None = None  # an order
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None  # what it says
        self._orders: Connection | None = None
        self._lifeline: Connection | None = None
        self._sending = threading.Lock()
        self._bundle = 0  # the latest; its orders carry this number
        self._specs: tuple[JobSpec, ...] = ()
        self._inputs: Inputs = NO_INPUTS
        self._open = 0  # its jobs, 0 once it has ended
        self._left: set[int] = set()  # those without an end yet
        self._running: frozenset[int] = frozenset()  # the micro-batch under way
        self._unwanted: frozenset[int] = frozenset()
        self._stopped = 0  # the bundle that is to be given back
        self._interruptible = True
        self._ending = False  # the process was killed to end a cancelled render
        self._frozen = False  # the process was killed since it stopped within a message
        self._eased_in_vain = False  # a new one is faster
        self._log = Log(log)
        self._files: tuple[str, dict[str, str]] | None = None  # hashes of what was loaded first

    # ------------------------------------------------------------ life and death
    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def adopt(self, *, micro_batch: int | None, eased: int) -> None:
        """Begin with this cap and these rungs of Engine.ease from the next process on."""
        self._config = replace(self._config, micro_batch=micro_batch, eased=eased)

    def start(self) -> EngineInfo:
        """A new process with the model loaded; a process still there is killed first.

        Raises ModelNotLoaded and EngineFault; InvalidConfig where another try is of no use.
        """
        self._release()
        self._open = 0
        self._begin_anew()
        return self._spawn()

    def _spawn(self) -> EngineInfo:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, their_events = spawn.Pipe(duplex=False)
        their_orders, self._orders = spawn.Pipe(duplex=False)
        their_line, self._lifeline = spawn.Pipe(duplex=False)
        _enlarge(self._pipe)
        self._log.begin()
        self._process = spawn.Process(
            target=child_main.main,
            args=(their_orders, their_events, their_line, self._config, self._log.path),
            name=f"engine-{self._config.engine}",
            daemon=True,
        )
        atexit.register(self.kill)
        self._process.start()
        for end in (their_orders, their_events, their_line):
            end.close()
        self._phase, self._frozen = self._loading, False
        message = self._receive()
        if not isinstance(message, Ready):
            raise AssertionError(f"expected Ready, got {message}")
        self._interruptible, self._eased_in_vain = message.info.interruptible, False
        self._phase = self._stepping
        self._check_same(message.info)
        return message.info

    def _check_same(self, info: EngineInfo) -> None:
        """What was told of the pictures must be true of those of every process."""
        files = (info.weights_sha256, info.loras)
        if files != (self._files or files):
            self._release()
            raise InvalidConfig(
                f"files of model {self._config.model} are others now than when this worker began; "
                "start it again"
            )
        self._files = files

    @property
    def longest_silence_s(self) -> float:
        """What `start` or the next event of `render` may take, at the most."""
        return self._loading.limit_s + max(self._stepping.limit_s, self._decoding.limit_s)

    def end_if_frozen(self) -> None:
        """Kill a process that stopped within a message, where its other end waits without an end.

        To be called from time to time. Safe from any thread; takes no lock, for whoever waits to
        send a bundle holds it.
        """
        process, began = self._process, (self._reading_since, self._sending_since)
        since = min((at for at in began if at is not None), default=None)
        if process and since is not None and monotonic() - since > self._phase.limit_s:
            self._frozen = True
            process.kill()

    def kill(self) -> None:
        """End the process at once; harmless when there is none. Safe from any thread."""
        process = self._process
        if process and process.is_alive():
            process.kill()
            process.join()

    def close(self) -> None:
        """Let the engine release its model and end; killed if it has not after 5 s."""
        self._send(Close())
        if self._process:
            self._process.join(CLOSE_TIMEOUT_S)
        self._release()
        self._open = 0

    def _release(self) -> None:
        self.kill()
        atexit.unregister(self.kill)
        with self._sending:
            for end in (self._pipe, self._orders, self._lifeline):
                if end:
                    end.close()
        self._process = self._pipe = self._orders = self._lifeline = None

    # ------------------------------------------------------------------- rendering
    def render(self, specs: Sequence[JobSpec], inputs: Inputs = NO_INPUTS) -> Iterator[Event]:
        """Render a bundle of one compatibility key; the ids in the events are its positions.

        `inputs`: the files of the input pictures that the jobs name, by key.
        Each job ends in exactly one Rendered, Failed or GivenBack, unless the process dies: then
        EngineCrashed, EngineKilled or EngineHung is raised after the events that came before. If
        the events are not read to their end, the jobs left are cancelled.
        """
        if not one_key(specs):
            raise InvalidParameter("a bundle holds jobs of one compatibility key only")
        self._abandon(self._bundle)
        if not specs:
            return iter(())
        if self._ending or self._eased_in_vain:  # killed when its bundle was over or given up
            self.start()
        self._bundle += 1
        self._specs, self._open, self._left = tuple(specs), len(specs), set(range(len(specs)))
        self._running, self._unwanted, self._inputs = frozenset(), frozenset(), inputs
        self._log.trim()
        self._send(Bundle(self._bundle, self._specs, inputs=inputs))
        return self._events(self._bundle)

    def cancel(self, ids: Iterable[int]) -> None:
        """Stop these jobs of the bundle under way between two steps. Safe from any thread."""
        unwanted = frozenset(ids)
        self._unwanted |= unwanted
        self._send(Cancel(self._bundle, unwanted))
        self._end_if_unwanted()

    def stop_after_current(self) -> None:
        """Finish the micro-batch under way and give the rest back. Safe from any thread.

        With no bundle under way it is the next that is given back, for it may be on its way.
        """
        self._stopped = self._bundle if self._open else self._bundle + 1
        self._send(StopAfterCurrent(self._stopped))

    def _events(self, bundle: int) -> Iterator[Event]:
        try:
            while self._open:
                try:
                    message = self._receive()
                except EngineFault:
                    if not self._ending:
                        raise
                    yield from self._replaced()
                    continue
                if isinstance(message, End):
                    self._open = 0
                    return
                events = _events_of(message)
                for event in events:
                    self._note(event)
                yield from events
        finally:
            self._abandon(bundle)

    def _note(self, event: Event) -> None:
        ends_steps = isinstance(event, Progress) and event.fraction >= 1
        self._phase = self._decoding if ends_steps else self._stepping
        if isinstance(event, Started):
            self._running = frozenset(event.ids)
            self._end_if_unwanted()
        elif isinstance(event, Cap):
            self._config = replace(self._config, micro_batch=event.size)
        elif isinstance(event, Eased):
            self._config = replace(self._config, eased=event.rungs)
        elif isinstance(event, TooLarge):
            self._eased_in_vain |= self._config.eased > event.eased
            self._config = replace(self._config, too_large=event.pixels, eased=event.eased)
        elif isinstance(event, Rendered | Failed | GivenBack):
            self._left.discard(event.id)
            self._running -= {event.id}

    def _end_if_unwanted(self) -> None:
        """Kill a process that renders what nobody wants, if it can be stopped in no other way."""
        with self._sending:
            unwanted = self._running and self._running <= self._unwanted
            if self._process and unwanted and not self._interruptible:
                self._ending = True
                self._process.kill()

    def _begin_anew(self) -> None:
        with self._sending:
            self._running, self._ending = frozenset(), False

    def _replaced(self) -> Iterator[Event]:
        """After a kill that ended a cancelled render: a new process takes over what is wanted."""
        for job in sorted(self._left & self._unwanted):
            self._left.discard(job)
            yield Failed(job, JobCancelled())
        if self._stopped >= self._bundle:
            for job in sorted(self._left):
                yield GivenBack(job)
            self._open = 0  # and the next render starts a process, should there be one
            return
        self._begin_anew()
        self._spawn()
        done = frozenset(range(self._open)) - self._left
        self._send(Bundle(self._bundle, self._specs, done, self._inputs))
        if self._unwanted:  # what came while there was no process
            self._send(Cancel(self._bundle, self._unwanted))
        if self._stopped >= self._bundle:
            self._send(StopAfterCurrent(self._stopped))

    def _abandon(self, bundle: int) -> None:
        """Cancel what is left of a bundle whose events nobody reads, and wait for its end."""
        if not self._open or bundle != self._bundle:
            return
        self.cancel(range(self._open))
        try:
            while not isinstance(message := self._receive(), End):
                for event in _events_of(message):
                    self._note(event)
        except EngineFault:
            if not self._ending:
                raise
        self._open = 0

    # -------------------------------------------------------------------- the pipe
    def _send(self, order: Order) -> None:
        """To the child, if it is there; its death is noticed by whoever reads."""
        with self._sending:
            if self._orders is None or self._orders.closed:
                return
            self._sending_since = monotonic()
            try:
                self._orders.send(order)
            except OSError:
                return
            finally:
                self._sending_since = None

    def _receive(self) -> Message | list[Rendered]:
        process, pipe, phase = self._process, self._pipe, self._phase
        if process is None or pipe is None:
            raise EngineCrashed("the engine's process is not running")
        try:
            if not wait([pipe, process.sentinel], phase.limit_s):
                self._give_up()
                raise phase.hung(process.pid, "was silent")
            if not pipe.poll():
                raise EOFError
            message = self._read(pipe)
        except (EOFError, OSError):
            process.join(1.0)
            self._give_up()
            if self._frozen:
                raise phase.hung(process.pid, "stopped within a message") from None
            raise phase.died(process.exitcode, self._log.last_words()) from None
        if isinstance(message, Broken):
            self._give_up()
            raise message.error()
        return message

    def _read(self, pipe: Connection) -> Message | list[Rendered]:
        self._reading_since = monotonic()
        try:
            message: Message = pipe.recv()
            if not isinstance(message, Shipped):
                return message
            pixels = np.frombuffer(pipe.recv_bytes(), np.uint8).reshape(-1, *message.shape)
        finally:
            self._reading_since = None
        return [
            Rendered(job, picture, message.seconds, message.batch)
            for job, picture in zip(message.ids, pixels, strict=True)
        ]

    def _give_up(self) -> None:
        self._release()
        if not self._ending:
            self._open = 0


def _enlarge(pipe: Connection) -> None:
    """Let a finished picture wait in the pipe, so that the engine renders on meanwhile.

    A user may have 1 MiB (pipe(7)); where there is less, or another system, the engine waits.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _events_of(message: Message | list[Rendered]) -> Sequence[Event]:
    if isinstance(message, list):
        return message
    if isinstance(message, Fault):
        return [Failed(message.id, by_code(message.code, message.message))]
    assert not isinstance(message, Ready | Broken | End | Shipped)
    return [message]
