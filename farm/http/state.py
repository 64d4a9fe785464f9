"""What every request finds: the farm, who may enter, and the looks that waiting requests share."""

from __future__ import annotations

import time
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from farm.http.limits import UPLOADS, Pace, Slots
from farm.http.live import Looks
from farm.http.metrics import Metrics
from farm.service import Farm
from farm.store import tokens
from farm.store.batches import BatchStatus
from farm.store.ids import JobRef
from farm.store.reads import Job

TOKENS_EVERY_S = 1.0
LONG_AT_ONCE = 4  # long works (submits, cancels of whole batches); the others wait, looks do not


class State:
    """One server's state. `open`: no token is asked for, since only this machine can ask."""

    def __init__(self, farm: Farm, *, open: bool) -> None:
        self.farm = farm
        self.open = open
        self._looked = time.monotonic()
        self.pace = Pace(farm.settings.http_rate)
        self.waits = Slots(farm.settings.http_waits, "waits and event streams")
        self.uploads = Slots(UPLOADS, "bodies")
        self.stopping = False
        self.batches = Looks[str, BatchStatus](farm.status)
        self.jobs = Looks[JobRef, Job](farm.job)
        self.metrics = Metrics(farm.db)
        self.long = CapacityLimiter(LONG_AT_ONCE)

    def asks_no_token(self) -> bool:
        """Whether it is still open; a token made meanwhile closes it for good, within a second."""
        if self.open and time.monotonic() - self._looked > TOKENS_EVERY_S:
            with self.farm.db.read() as connection:
                self.open = not tokens.is_any(connection)
            self._looked = time.monotonic()
        return self.open

    def is_stopping(self) -> bool:
        return self.stopping


def _here(request: Request) -> State:
    state: State = request.app.state.here
    return state


Here = Annotated[State, Depends(_here)]
