"""Submitting: a stream of new jobs into one batch, in chunks, whatever its length.

A plain batch is held until its last row was good, and gone again if one was not. An eager one is
handed out from its first chunk on, and bad rows are left out. With a key, a submit that was
interrupted goes on where it stopped, and one that was finished is not done again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from farm.errors import (
    InvalidParameter,
    InvalidPromptFile,
    KeyReused,
    QuotaExceeded,
    RowError,
    SubmitInProgress,
    things_wrong,
)
from farm.spec import FIELDS, NewJob, refuse_controls
from farm.store import batches, intake, jobs, owners
from farm.store.batches import Made, Once
from farm.store.db import Database

CHUNK = 20_000  # jobs in one transaction
FIRST_CHUNK = 64  # of an eager submit, so that it starts at once; then four times as many
FLUSH_S = 0.5  # an eager chunk waits no longer for more rows
GIVE_UP = 100_000  # bad rows after which no more are read
MOST_ERRORS = 1_000  # bad rows kept for the report; the rest are counted
MAX_LABEL = 200  # characters of a batch's name and owner
MAX_PRIORITY = 1_000_000
MAX_EXPIRES_S = 10 * 365 * 86_400
_OWN = ("prompt", "negative_prompt", "seed", "engine")  # columns of each job
_SHARED = {name for name in FIELDS if name not in _OWN}


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Plan:
    """How to submit.

    `takeover_s`: an unfinished submit of the same key is gone on with when its submitter has been
    silent for so many seconds; `resumed` is then called with the jobs that were in, as it is for
    one that was whole. `settle` is called before each commit, `started` when the first jobs may be
    taken, `progress` with the jobs queued so far, `left_out` with a bad row of an eager submit.
    """

    name: str = ""
    owner: str = ""
    priority: int = 0
    once: Once | None = None
    takeover_s: float = 10.0
    eager: bool = False
    reuse: bool = True  # link the pictures that were rendered before
    after: str | None = None  # a batch that must be done with first
    expires_s: float | None = None  # what has not begun by then is cancelled
    settle: Callable[[], None] = _nothing
    started: Callable[[], None] = _nothing
    progress: Callable[[int], None] = _nothing
    left_out: Callable[[RowError], None] = _nothing
    resumed: Callable[[int], None] = _nothing

    def __post_init__(self) -> None:
        """Raises InvalidParameter for what no batch can be."""
        for name in ("name", "owner"):
            _refuse_label(name, getattr(self, name))
        if not isinstance(self.eager, bool) or not isinstance(self.reuse, bool):
            raise InvalidParameter("eager and reuse: True or False")
        check_priority(self.priority)
        if not (self.after is None or isinstance(self.after, str)):
            raise InvalidParameter("after: the id of a batch")
        if not (self.expires_s is None or _is_number(self.expires_s, 0, MAX_EXPIRES_S)):
            raise InvalidParameter("expires_s: a number of seconds, ten years at most")


def check_priority(value: Any) -> None:
    """Raises InvalidParameter."""
    if not _is_number(value, -MAX_PRIORITY, MAX_PRIORITY) or value % 1:
        raise InvalidParameter(f"priority: a whole number up to {MAX_PRIORITY:,} either way")


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _refuse_label(name: str, text: Any) -> None:
    """Raises InvalidParameter."""
    if not isinstance(text, str) or len(text) > MAX_LABEL:
        raise InvalidParameter(f"{name}: a text of at most {MAX_LABEL} characters")
    try:
        refuse_controls(text)
    except ValueError as error:
        raise InvalidParameter(f"{name}: {error}") from None


class Options(TypedDict, total=False):
    """What may be said with a submit.

    `n`: pictures of each row, seeds counting up. `eager`: hand jobs out at once and leave bad rows
    out, each told to `left_out`. `once`: do it once however often it is asked for; a submit that
    was interrupted is gone on with after `takeover_s` seconds of silence. `resumed`: called with
    the jobs that an earlier submit had queued. `progress`: with all that are queued so far.
    `reuse`: a job whose picture was rendered before is linked to it (the default).
    `after`: the id of a batch that must be done with first, however it ends. `expires_s`: jobs that
    have not begun so many seconds from now are cancelled.
    `files`: rows may name files of this machine. The others are fields of JobSpec, which every row
    inherits.
    """

    n: int
    name: str
    owner: str
    priority: int
    eager: bool
    reuse: bool
    after: str | None
    expires_s: float | None
    once: Once | None
    takeover_s: float
    progress: Callable[[int], None]
    left_out: Callable[[RowError], None]
    resumed: Callable[[int], None]
    files: bool
    model: str | None
    engine: str | None
    prompt: str | None
    negative_prompt: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    seed: int | None
    scheduler: str | None
    format: str | None
    init_image: str | Path | None
    mask_image: str | Path | None
    strength: float | None
    loras: str | Mapping[str, float] | None
    clip_skip: int | None


@dataclass
class Submitted:
    """What became of it.

    `resumed`: jobs that were in before. `bad`: rows left out, the first of them in `errors`.
    """

    batch_id: str = ""
    total: int = 0
    resumed: int = 0
    bad: int = 0
    errors: list[RowError] = field(default_factory=list)


def submit(db: Database, stream: Iterable[NewJob | RowError], plan: Plan) -> Submitted:
    """Queue the stream as one batch, or go on with the one that the same request began.

    Raises InvalidPromptFile with the bad rows (unless eager) or when no row is good, KeyReused when
    the key was used for something else, and SubmitInProgress when another process is at it.
    """
    return _Submit(db, plan).run(iter(stream))


class _Submit:
    def __init__(self, db: Database, plan: Plan) -> None:
        self._db, self._plan = db, plan
        self._told = Submitted()
        self._shared: dict[str, Any] = {}
        self._digest = hashlib.sha256()

    def run(self, stream: Iterator[NewJob | RowError]) -> Submitted:
        made = self._made()
        good = self._good(stream)
        try:
            if made:
                self._go_on(made, good)
            if not (made and made.whole):
                for chunk in _chunks(good, self._plan.eager):
                    self._insert(chunk)
                self._finish()
        except (InvalidPromptFile, QuotaExceeded):
            self._remove()
            raise
        except BaseException:
            if not self._plan.once:
                self._remove()
            raise
        return self._told

    def _made(self) -> Made | None:
        if not self._plan.once:
            return None
        with self._db.read() as connection:
            made = batches.made_by(connection, self._plan.owner, self._plan.once)
        if made and not made.whole and made.silent_s < self._plan.takeover_s:
            raise SubmitInProgress()
        return made

    def _good(self, stream: Iterator[NewJob | RowError]) -> Iterator[NewJob]:
        """The good rows; unless eager, only those before the first bad one."""
        told = self._told
        for item in stream:
            if isinstance(item, NewJob):
                if self._plan.eager or not told.bad:
                    yield item
                continue
            told.bad += 1
            if self._plan.eager:
                self._plan.left_out(item)
            if len(told.errors) < MOST_ERRORS:
                told.errors.append(item)
            if told.bad >= GIVE_UP and not self._plan.eager:
                raise InvalidPromptFile(
                    f"{things_wrong(told.bad)}, and the rest was not read; nothing was queued",
                    told.errors,
                )

    def _go_on(self, made: Made, good: Iterator[NewJob]) -> None:
        """Pass over what is in already; it must be the same as it was."""
        left = made.total
        while left and (chunk := list(islice(good, min(left, CHUNK)))):
            self._digest.update(_texts(chunk))
            left -= len(chunk)
        more = made.whole and next(good, None) is not None
        if left or more or self._digest.hexdigest() != made.digest:
            raise KeyReused(
                f"the idempotency key was used for batch {made.id}, and these are not its prompts; "
                "give the same ones, or another key"
            )
        self._shared = made.params
        told = self._told
        told.batch_id, told.total, told.resumed = made.id, made.total, made.total
        self._plan.resumed(told.total)
        self._plan.progress(told.total)

    def _insert(self, chunk: list[NewJob]) -> None:
        told, plan = self._told, self._plan
        plan.settle()
        self._digest.update(_texts(chunk))
        first = not told.batch_id
        with self._db.write() as connection:
            owners.check_queued(connection, plan.owner, len(chunk))
            if first:
                self._shared = chunk[0].shape.spec.model_dump(mode="json", include=_SHARED)
                batch_id = batches.create(
                    connection,
                    self._shared,
                    name=plan.name,
                    owner=plan.owner,
                    priority=plan.priority,
                    once=plan.once,
                    ready=plan.eager,
                    reuse=plan.reuse,
                    after=plan.after,
                    expires_s=plan.expires_s,
                )
            else:
                batch_id = told.batch_id
            total, digest = told.total + len(chunk), self._digest.hexdigest()
            if not batches.grow(connection, batch_id, told.total, total, digest):
                raise SubmitInProgress()
            intake.insert(connection, batch_id, told.total, chunk, self._shared)
        told.batch_id, told.total = batch_id, total
        if first and plan.eager:
            plan.started()
        plan.progress(total)

    def _finish(self) -> None:
        told = self._told
        if told.bad and not self._plan.eager:
            raise InvalidPromptFile(f"{things_wrong(told.bad)}; nothing was queued", told.errors)
        if not told.total:
            what = "no row of it is good" if told.bad else "there is no prompt in it"
            raise InvalidPromptFile(f"{what}; nothing was queued", told.errors)
        with self._db.write() as connection:
            batches.release(connection, told.batch_id, told.total)
            jobs.close_if_finished(connection, told.batch_id)
        self._plan.started()

    def _remove(self) -> None:
        """Nothing stays of a submit that failed; what an eager one handed out ends as it is."""
        told = self._told
        if not told.batch_id:
            return
        with self._db.write() as connection:
            if self._plan.eager:
                batches.release(connection, told.batch_id, told.total)
                jobs.close_if_finished(connection, told.batch_id)
            else:
                batches.remove(connection, told.batch_id)


def _chunks(stream: Iterator[NewJob], eager: bool) -> Iterator[list[NewJob]]:
    """Lists of jobs; of an eager submit small ones first, and none waits long for more."""
    if not eager:
        while chunk := list(islice(stream, CHUNK)):
            yield chunk
        return
    chunk, size, until = [], FIRST_CHUNK, time.monotonic() + FLUSH_S
    for job in stream:
        chunk.append(job)
        if len(chunk) >= size or time.monotonic() > until:
            yield chunk
            chunk, size, until = [], min(size * 4, CHUNK), time.monotonic() + FLUSH_S
    if chunk:
        yield chunk


def _texts(chunk: list[NewJob]) -> bytes:
    """What tells whether two streams are the same. Seeds are no part: they may have been drawn."""
    return "".join(map(_text, chunk)).encode()


def _text(job: NewJob) -> str:
    spec, pictures = job.shape.spec, ""
    if spec.init_image:
        pictures = f"\t{spec.init_image}\t{spec.mask_image}"
    return f"{job.shape.key}\t{job.prompt}\t{job.negative_prompt}{pictures}\n"
