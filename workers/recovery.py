"""The way back to work: a new engine for one that died, self-tests while the breaker is open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from farm.catalog import Lane, load_catalog
from farm.config import Settings
from farm.errors import (
    DatabaseUnavailable,
    EngineCrashed,
    EngineFault,
    EnvironmentFault,
    FarmError,
    Invalid,
    InvalidConfig,
    RenderFailed,
)
from farm.pictures import Origin, encode
from farm.spec import JobSpec
from farm.store import proof
from farm.store.db import Database
from workers.breaker import Breaker
from workers.child import Child
from workers.messages import Failed, Rendered

log = logging.getLogger(__name__)


class Recovery:
    """Belongs to the thread that renders. `origin`: what this worker renders with.

    `give_up` is called when no other try is of use.
    """

    def __init__(
        self,
        db: Database,
        settings: Settings,
        lane: Lane,
        origin: Origin,
        child: Child,
        breaker: Breaker,
        stopping: threading.Event,
        give_up: Callable[[FarmError], None],
    ) -> None:
        self._db, self._settings, self._lane = db, settings, lane
        self._origin, self._child, self._breaker = origin, child, breaker
        self._stopping, self._give_up = stopping, give_up
        self._failed = False  # the last test: its process is not used again

    def restart(self) -> None:
        """A new engine; the breaker opens if there is none to be had now."""
        try:
            self._child.start()
        except InvalidConfig as error:
            self._give_up(error)
        except Exception as error:
            self._breaker.trip(as_fault(error))
            log.warning("no engine; the worker %s", self._breaker.note)

    def until_well(self) -> None:
        """While the breaker is open: rest and test, until a test passes or the worker stops."""
        while self._breaker.is_open:
            if self._stopping.wait(self._breaker.rest_s()):
                return
            try:
                error = self._test()
            except InvalidConfig as fault:
                return self._give_up(fault)
            except Exception as fault:
                error = as_fault(fault)
            self._failed = error is not None
            self._breaker.tested(error, 0 if error else self._done_elsewhere())
            log.warning("after its self-test the worker %s", self._breaker.note)

    def _test(self) -> FarmError | None:
        """Render what was rendered before, and keep it nowhere; None: it is as it should be."""
        if self._failed or not self._child.alive:
            self._child.start()
        spec = self._spec()
        log.info("self-test: %dx%d in %d steps", spec.width, spec.height, spec.steps)
        error: FarmError | None = RenderFailed("no picture came")
        for event in self._child.render([spec]):
            if isinstance(event, Failed):
                error = event.error
            elif isinstance(event, Rendered):
                encode(event.pixels.tobytes(), spec, self._origin)
                error = None
        return None if isinstance(error, Invalid) else error  # a job that is not for this model

    def _spec(self) -> JobSpec:
        """What anybody rendered on this lane, else a plain job with the model's defaults."""
        try:
            with self._db.read() as connection:
                found = proof.proven(connection, self._lane)
        except DatabaseUnavailable:
            found = None
        if found:
            return found
        catalog = load_catalog(self._settings.catalog_path, self._settings.models_path)
        told = catalog.get(self._lane.model).defaults.model_dump()
        return JobSpec(model=self._lane.model, prompt="a red circle", seed=0, **told)

    def _done_elsewhere(self) -> int:
        try:
            with self._db.read() as connection:
                return proof.succeeded_among(connection, self._breaker.blamable())
        except DatabaseUnavailable:
            return 0


def as_fault(error: Exception) -> FarmError:
    """What a render loop stumbled over, as a fault of the engine or of its surroundings."""
    if isinstance(error, EngineFault | EnvironmentFault):
        return error
    log.error("the render loop stumbled", exc_info=error)
    return EngineCrashed(f"{type(error).__name__}: {error}")
