"""One run at a time in a place: a lease in SQL, which a thread renews."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from farm.datasets.batches import POLL_S, Tell, patiently
from farm.errors import EnvironmentFault, Invalid
from farm.store import leases
from farm.store.db import Database

TTL_S = 6.0  # a run that was killed is waited for so long
RENEW_S = 1.5


@contextmanager
def alone(db: Database, where: str, tell: Tell) -> Iterator[Callable[[], None]]:
    """Hold the place of a dataset; another run that has it is waited for, on whatever machine.

    Gives `check`, which raises Invalid once another run has taken the place: this process must have
    stood still for longer than TTL_S. Runs of a farm with another database are not seen.
    """
    name = f"dataset {hashlib.sha256(where.encode()).hexdigest()[:24]}"
    holder = leases.holder_name()
    take = partial(_take, db, name, holder)
    told = False
    while not patiently(take, tell):
        if not told:
            tell.trouble(f"another run writes to {where}, or was killed just now; waiting for it")
        told = True
        time.sleep(POLL_S)
    over, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not over.wait(RENEW_S) and not lost.is_set():
            with suppress(EnvironmentFault):  # nobody else can take it either
                if not take():
                    lost.set()

    def check() -> None:
        if lost.is_set():
            raise Invalid(
                f"another run has taken over {where}, for this one stood still; let it end"
            )

    thread = threading.Thread(target=renew, name="dataset-lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
        with suppress(EnvironmentFault), db.write() as connection:
            leases.give_up(connection, name, holder)


def _take(db: Database, name: str, holder: str) -> bool:
    with db.write() as connection:
        return leases.take(connection, name, holder, TTL_S)
