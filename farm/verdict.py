"""What becomes of a job whose render did not end in a picture. Workers report, the farm judges."""

from __future__ import annotations

from sqlalchemy import Connection

from farm.config import Settings
from farm.errors import (
    EngineFault,
    EnvironmentFault,
    FarmError,
    Invalid,
    JobCancelled,
    OutOfMemory,
    WorkerLost,
)
from farm.store import jobs
from farm.store.jobs import Claim

MAX_DELAY_S = 300.0


def settle_failure(
    connection: Connection, held: Claim, error: FarmError, settings: Settings
) -> bool:
    """Move a running job on by the class of its error; False: the claim was lost."""
    if isinstance(error, JobCancelled):
        return jobs.requeue(connection, held, error)  # cancelled, if a person did ask for it
    if isinstance(error, Invalid | OutOfMemory):
        return jobs.fail(connection, held, error)
    delay = min(settings.retry_delay_s * 2.0**held.failures, MAX_DELAY_S)
    if isinstance(error, EnvironmentFault):
        return jobs.requeue(connection, held, error, delay_s=delay)
    killer = held.suspect and isinstance(error, EngineFault) and not isinstance(error, WorkerLost)
    if killer or held.failures + 1 >= settings.max_failures:
        return jobs.fail(connection, held, error)
    if isinstance(error, EngineFault):
        return jobs.requeue(connection, held, error, count=True, suspect=True)
    return jobs.requeue(connection, held, error, count=True, delay_s=delay)


def give_back(connection: Connection, held: Claim, why: str) -> bool:
    """Return a job that is nobody's fault: no failure counted, free at once."""
    return jobs.requeue(connection, held, FarmError(why))
