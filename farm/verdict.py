"""What becomes of a job whose render did not end in a picture. Workers report, the farm judges."""

from __future__ import annotations

from sqlalchemy import Connection

from farm.catalog import Lane
from farm.config import Settings
from farm.errors import (
    EngineFault,
    EngineKilled,
    EnvironmentFault,
    FarmError,
    Invalid,
    JobCancelled,
    JobGivenBack,
    OutOfMemory,
    WorkerLost,
)
from farm.store import jobs, sessions
from farm.store.jobs import Claim
from farm.units import show_size

MAX_DELAY_S = 300.0
FROM_OUTSIDE = (EngineKilled, WorkerLost)
"""What may have struck any job: a suspect that meets it again has the rest of its tries."""


def settle_failure(
    connection: Connection, held: Claim, error: FarmError, settings: Settings
) -> bool:
    """Move a running job on by the class of its error; False: the claim was lost."""
    if isinstance(error, JobCancelled):
        return jobs.requeue(connection, held, error)  # cancelled, if a person did ask for it
    if isinstance(error, OutOfMemory):
        return _settle_out_of_memory(connection, held, error)
    if isinstance(error, Invalid):
        return jobs.fail(connection, held, error)
    delay = min(settings.retry_delay_s * 2.0**held.failures, MAX_DELAY_S)
    if isinstance(error, EnvironmentFault):
        return jobs.requeue(connection, held, error, delay_s=delay, avoid=True)
    quarantined = held.suspect and _is_own_doing(error)
    if quarantined or held.failures + 1 >= settings.max_failures:
        return jobs.fail(connection, held, error)
    if isinstance(error, EngineFault):
        return jobs.requeue(connection, held, error, count=True, suspect=True, avoid=True)
    return jobs.requeue(connection, held, error, count=True, delay_s=delay, avoid=True)


def _is_own_doing(error: FarmError) -> bool:
    return isinstance(error, EngineFault) and not isinstance(error, FROM_OUTSIDE)


def _settle_out_of_memory(connection: Connection, held: Claim, error: OutOfMemory) -> bool:
    """On to a worker with more memory, if there is one; no failure is counted for that."""
    memory = sessions.memory_of(connection, held.session_id)
    lane = Lane(held.spec.model, held.spec.engine or "")
    if memory is None or not sessions.is_exceeded(connection, lane, memory):
        return jobs.fail(connection, held, error)
    waits = f"{error.message}; it waits for a worker with more than {show_size(memory)}"
    return jobs.requeue(connection, held, OutOfMemory(waits), needs_memory=memory)


def give_back(connection: Connection, held: Claim, why: str) -> bool:
    """Return a job that is nobody's fault: no failure counted, free at once."""
    return jobs.requeue(connection, held, JobGivenBack(why))
