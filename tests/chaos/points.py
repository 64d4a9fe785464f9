"""A worker that kills itself, with SIGKILL, the first time it comes to a named point of its way.

    python -m tests.chaos.points "after the claim" --model M --engine E

What is patched is patched in this process only; the worker is the real one otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from farm import dispatch
from farm.blobs.local import LocalBlobs
from farm.blobs.s3 import S3Blobs
from farm.store import jobs
from farm.store.db import Database
from workers import app
from workers.recorder import Recorder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_claim() -> None:
    claim = dispatch.claim_bundle

    def claim_bundle(*args: Any) -> Any:
        bundle = claim(*args)
        if bundle:
            die()
        return bundle

    dispatch.claim_bundle = claim_bundle


def after_start_mark() -> None:
    _after_commit_of("mark_started")


def mid_render() -> None:
    Recorder.progress = lambda *_: die()  # type: ignore[method-assign]


def before_object() -> None:
    for store in (LocalBlobs, S3Blobs):
        store.put = lambda *_: die()  # type: ignore[assignment, method-assign]


def after_object() -> None:
    for store in (LocalBlobs, S3Blobs):

        def put(*args: Any, put: Callable[..., None] = store.put) -> None:
            put(*args)
            die()

        store.put = put  # type: ignore[assignment, method-assign]


def before_record() -> None:
    """The rows are written, and the commit is next."""
    succeed = jobs.succeed

    def write_and_die(connection: Any, done: Any) -> Any:
        moved = succeed(connection, done)
        if done:
            die()
        return moved

    jobs.succeed = write_and_die


def after_record() -> None:
    _after_commit_of("succeed")


def _after_commit_of(name: str) -> None:
    """Die when the transaction in which this function of `jobs` had something to do is over."""
    function, write = getattr(jobs, name), Database.write
    armed = False

    def noted(connection: Any, some: Any) -> Any:
        nonlocal armed
        some = list(some)
        armed = armed or bool(some)
        return function(connection, some)

    @contextmanager
    def then_die(self: Database) -> Iterator[Any]:
        with write(self) as connection:
            yield connection
        if armed:
            die()

    setattr(jobs, name, noted)
    Database.write = then_die  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {
    "after the claim": after_claim,
    "after the start mark": after_start_mark,
    "mid-render": mid_render,
    "before the object is stored": before_object,
    "after the object is stored": after_object,
    "before the record is committed": before_record,
    "after the record is committed": after_record,
}

if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    sys.exit(app.main(sys.argv[2:]))
