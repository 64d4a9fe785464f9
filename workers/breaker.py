"""A worker that fails job after job stops taking work, until a self-test shows that it can again.

closed      it works as usual
open        it takes nothing: it tests itself, at once the first time, and rests between two tests
half open   the test has passed: it takes single jobs until a picture is stored

A worker is not to blame for a batch of bad jobs: it passes its test, and goes on at once. But where
others have rendered what failed here, it rests first, though it passes.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from farm.errors import (
    BlobDamaged,
    BlobNotFound,
    EngineFault,
    FarmError,
    ModelNotLoaded,
    OutOfMemory,
    RenderFailed,
)
from farm.store.ids import JobRef

MOST_FAILURES = 5  # different jobs in a row, without a picture between
MOST_KNOWN = 256  # jobs that are remembered, of those that failed
REST_S, MAX_REST_S = 10.0, 300.0  # between two self-tests, doubled each time
BLAMED = (BlobDamaged, BlobNotFound, EngineFault, ModelNotLoaded, OutOfMemory, RenderFailed)
"""What may be the worker's own fault; a store that is away is not, nor a bad parameter."""


class Breaker:
    """Safe from any thread. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failed: dict[JobRef, FarmError] = {}  # since the last picture
        self._streak = 0  # failures of different jobs since then, or since the last self-test
        self._open, self._half = False, False
        self._rests, self._rested = 0, False  # since the last picture; before the test to come
        self._until = 0.0
        self._why = ""

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def is_half_open(self) -> bool:
        return self._half

    @property
    def note(self) -> str:
        """Why it takes no work, or only single jobs, for a person; empty when it is closed."""
        if self._half:
            return f"takes single jobs until a picture is stored: {self._why}"
        if not self._open:
            return ""
        left = self._until - self._clock()
        then = f"tests itself in {left:.0f} s" if left > 0 else "tests itself now"
        return f"{then}: {self._why}"

    def succeeded(self) -> None:
        """A picture was stored. One that was rendered before the breaker opened changes nothing."""
        if self._open or not (self._streak or self._half):
            return
        with self._lock:
            if not self._open:
                self._failed.clear()
                self._streak, self._rests, self._half = 0, 0, False

    def failed(self, job: JobRef | None, error: FarmError) -> None:
        """A job failed here; None: the engine died, and no job is to blame."""
        if not isinstance(error, BLAMED):
            return
        with self._lock:
            if self._open:
                return
            self._streak += job not in self._failed
            if job:
                self._failed[job] = error
            if len(self._failed) > MOST_KNOWN:
                del self._failed[next(iter(self._failed))]
            if self._half or self._streak >= MOST_FAILURES:
                jobs = "a job alone" if self._half else f"{self._streak} jobs in a row"
                self._why = f"{jobs} failed here, the last with {error.code}: {error.message}"
                self._begin()

    def trip(self, error: FarmError) -> None:
        """The engine does not start: open at once, and rest before the next try."""
        with self._lock:
            self._begin()
            self._rest(f"{error.code}: {error.message}")

    def blamable(self) -> list[JobRef]:
        """The jobs that failed here, but not those that another worker has only more memory for."""
        with self._lock:
            found = self._failed.items()
            return [job for job, error in found if not isinstance(error, OutOfMemory)]

    def rest_s(self) -> float:
        """Seconds until the next self-test."""
        return max(0.0, self._until - self._clock())

    def tested(self, error: FarmError | None, done_elsewhere: int = 0) -> None:
        """The self-test is over. `done_elsewhere`: jobs that failed here and succeeded since."""
        with self._lock:
            if error:
                self._rest(f"its self-test failed, {error.code}: {error.message}")
            elif done_elsewhere and not self._rested:
                self._rest(f"others rendered {done_elsewhere} of the jobs that failed here")
            else:
                self._open, self._half, self._streak = False, True, 0

    def _begin(self) -> None:
        self._open, self._half, self._rested = True, False, False
        self._until = self._clock()

    def _rest(self, why: str) -> None:
        rest_s = min(REST_S * 2.0**self._rests, MAX_REST_S) * random.uniform(0.8, 1.2)
        self._until, self._why = self._clock() + rest_s, why
        self._rests, self._rested = self._rests + 1, True
