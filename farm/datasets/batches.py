"""The batches of a run: submitted once, found again by their keys, and waited for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar

from farm.catalog import Catalog
from farm.datasets.recipe import Recipe
from farm.datasets.rows import Planned, Seeds, planned
from farm.errors import (
    DatabaseUnavailable,
    InvalidConfig,
    InvalidPromptFile,
    KeyReused,
    PictureBlocked,
    RowError,
    StorageRefused,
    StorageUnavailable,
    SubmitInProgress,
)
from farm.prompt_files import Row
from farm.prompts import row_of
from farm.service import Farm
from farm.store import reads
from farm.store.batches import BatchStatus, Once
from farm.store.reads import Job
from farm.submitting import MAX_PRIORITY

POLL_S = 0.25
AWAY_S, MAX_AWAY_S = 0.5, 15.0
SILENT_S = 10.0  # another process that submits the same is waited for, unless it is so long silent
CHANGED = "the prompts or the recipe were changed while the run was under way: run it again"
T = TypeVar("T")


class Tell(Protocol):
    """Is told how far a run is."""

    def queued(self, total: int) -> None:
        """So many rows are in the batch."""

    def batch(self, status: BatchStatus) -> None:
        """The batch is there, whole."""

    def waits(self, status: BatchStatus) -> None:
        """For jobs; called again and again."""

    def shard(self, shard: int, shards: int, written: bool) -> None:
        """A shard is complete; `written`: now."""

    def trouble(self, text: str) -> None:
        """Something is away and waited for."""


def patiently(do: Callable[[], T], tell: Tell) -> T:
    """`do`, again and again while the database or the blob store is away."""
    wait, told = AWAY_S, ""
    while True:
        try:
            return do()
        except StorageRefused:
            raise
        except (DatabaseUnavailable, StorageUnavailable) as error:
            if error.message != told:
                told = error.message
                tell.trouble(f"{told}; waiting until it is back")
        time.sleep(wait)
        wait = min(wait * 2, MAX_AWAY_S)


def batch_key(catalog: Catalog, recipe: Recipe, label: str) -> Once:
    """By which the batch of a recipe and label is found again."""
    named = {name: catalog.models.get(name) for name in map(str, recipe.models)}
    defaults = {name: one.defaults.model_dump(mode="json") for name, one in named.items() if one}
    digest = recipe.digest(label, defaults)
    return Once(f"dataset-{recipe.name}-{digest[:32]}", digest)


def asked(job: Job) -> str:
    """What it was to render; jobs that say the same may stand for each other."""
    return json.dumps(job.spec, sort_keys=True)


def rows_of(stream: Iterable[Planned | RowError]) -> Iterator[Row]:
    """What a submit takes; each row is one job."""
    for one in stream:
        if isinstance(one, RowError):
            yield one.line, one
        else:
            yield one.line, one.fields | {"n": 1}


@contextmanager
def told_once(recipe: Recipe) -> Iterator[None]:
    """What is wrong with rows, by where a person mends it.

    Raises InvalidConfig for values of [params], each once however many rows have it, and
    InvalidPromptFile with the prompt file's name for the rest.
    """
    try:
        yield
    except InvalidPromptFile as error:
        mine = {
            one.field: one for one in reversed(error.errors) if recipe.gives(one.field, one.got)
        }
        if mine:
            told = [f"params.{str(one).partition(': ')[2]}" for one in mine.values()]
            raise InvalidConfig("\n  ".join(["the recipe is wrong:", *sorted(told)])) from None
        if recipe.prompts.file:
            raise InvalidPromptFile(
                f"{recipe.prompts.file}: {error.message}", error.errors
            ) from None
        raise


class Batches:
    """Submits and looks at the batches of one recipe and label; outages are waited out.

    `redrive`: what failed or was cancelled is queued again when its batch is found. Jobs whose
    pictures were lost are told as those that rendered them anew.
    """

    def __init__(
        self, farm: Farm, recipe: Recipe, label: str, priority: int, redrive: bool, tell: Tell
    ) -> None:
        self._farm, self._recipe, self._label = farm, recipe, label
        self._priority, self._redrive, self._tell = priority, redrive, tell
        self._seeds = Seeds(recipe, label)
        self._key = batch_key(farm.catalog, recipe, label)
        self._name = f"{recipe.name} {label}".strip()
        self._instead: dict[str, Job] = {}
        self._redriven: set[str] = set()

    def check(self) -> None:
        """Raises InvalidConfig when the prompts were changed since the run began."""
        if batch_key(self._farm.catalog, self._recipe, self._label) != self._key:
            raise InvalidConfig(CHANGED)

    def main(self) -> BatchStatus:
        """The batch of all rows. Raises as `told_once` does for bad ones."""
        rows = lambda: rows_of(planned(self._recipe, self._label))  # noqa: E731
        found = self._made(rows, self._key, self._name, self._priority, progress=self._tell.queued)
        self._tell.batch(found)
        for more in self._rendered_anew():
            self._take(more)
        return found

    def attempt(self, rows: Sequence[tuple[int, Planned]], attempt: int) -> list[Job]:
        """A further picture for each of these rows, by number; their jobs, once all are done."""
        seeded = [(n, row, self._seeds.of(row.place, attempt)) for n, row in rows]
        told = json.dumps([self._key.sha256, [(n, seed) for n, _, seed in seeded]])
        digest = hashlib.sha256(told.encode()).hexdigest()
        key = Once(f"dataset-{self._recipe.name}-again-{digest[:32]}", digest)
        again = [(row.line, row.fields | {"n": 1, "seed": seed}) for _, row, seed in seeded]
        found = self._first(again, key, f"attempt {attempt + 1}")
        self.wait(found.id, 0, len(again))
        return self.jobs(found.id, 0, [seed for _, _, seed in seeded])

    def render_anew(self, lost: Sequence[Job]) -> None:
        """The pictures of these jobs, which are gone or damaged: one more batch of the run."""
        rows = [(n, row_of(job.spec) | {"n": 1}) for n, job in enumerate(lost, 1)]
        key = self._lost_key(sum(1 for _ in self._rendered_anew()))
        self._take(self._first(rows, key, "lost pictures", reuse=False))

    def _rendered_anew(self) -> Iterator[BatchStatus]:
        for number in count():
            look = partial(self._farm.made_by, self._recipe.owner, self._lost_key(number))
            found = None
            with suppress(SubmitInProgress):  # broken off: it is submitted again when it is wanted
                found = patiently(look, self._tell)
            if found is None:
                return
            yield found

    def _lost_key(self, number: int) -> Once:
        digest = hashlib.sha256(f"{self._key.sha256} {number}".encode()).hexdigest()
        return Once(f"dataset-{self._recipe.name}-lost-{digest[:32]}", digest)

    def _take(self, found: BatchStatus) -> None:
        self._drive_again(found)
        self.wait(found.id, 0, found.total)
        some = patiently(lambda: self._page(found.id, 0, found.total), self._tell)
        self._instead |= {asked(job): job for job in some}

    def _first(self, rows: Sequence[Row], key: Once, what: str, **more: Any) -> BatchStatus:
        """A batch of these rows that goes before what is left of the run."""
        priority = min(self._priority + 1, MAX_PRIORITY)
        return self._made(lambda: iter(rows), key, f"{self._name}, {what}", priority, **more)

    def wait(self, batch_id: str, first: int, end: int) -> None:
        """Until every job of these places is in a final state."""
        while patiently(lambda: self._is_open(batch_id, first, end), self._tell):
            self._tell.waits(patiently(lambda: self._farm.status(batch_id), self._tell))
            time.sleep(POLL_S)

    def _is_open(self, batch_id: str, first: int, end: int) -> bool:
        with self._farm.db.read() as connection:
            return reads.is_open(connection, batch_id, first, end)

    def jobs(self, batch_id: str, first: int, seeds: Sequence[int]) -> list[Job]:
        """The jobs from a place on, which must have these seeds.

        Raises InvalidConfig, and NotFound for a batch that was pruned.
        """
        found = patiently(lambda: self._page(batch_id, first, len(seeds)), self._tell)
        if [job.spec["seed"] for job in found] != list(seeds):
            patiently(lambda: self._farm.status(batch_id), self._tell)
            raise InvalidConfig(CHANGED)
        if self._instead:
            found = [self._instead.get(asked(job), job) for job in found]
        return found

    def _page(self, batch_id: str, first: int, n: int) -> list[Job]:
        with self._farm.db.read() as connection:
            return reads.page(connection, batch_id, after=first - 1, limit=n)

    def _made(
        self, rows: Callable[[], Iterator[Row]], key: Once, name: str, priority: int, **more: Any
    ) -> BatchStatus:
        """The batch of these rows: submitted before, or in part, or now."""
        about: Any = {"name": name, "owner": self._recipe.owner, "priority": priority, "once": key}
        about |= self._recipe.shared | more

        def submit() -> BatchStatus:
            with told_once(self._recipe):
                return self._farm.submit_rows(rows(), self._recipe.folder, **about)

        about["takeover_s"] = 0.0  # the process that began it is gone, or says so below
        while True:
            try:
                found = patiently(submit, self._tell)
                break
            except SubmitInProgress:
                if not about["takeover_s"]:
                    self._tell.trouble("another process submits the same rows; waiting for it")
                about["takeover_s"] = SILENT_S
                time.sleep(POLL_S)
            except KeyReused as error:
                raise InvalidConfig(
                    f"{error.message}: the models, the checks or the pictures that rows begin with "
                    "have changed since; give "
                    "the run another --label, or forget that batch with `farm prune`"
                ) from None
        self._drive_again(found)
        return found

    def _drive_again(self, found: BatchStatus) -> None:
        if self._redrive and found.id not in self._redriven:
            patiently(lambda: self._again(found), self._tell)
            self._redriven.add(found.id)

    def _again(self, found: BatchStatus) -> None:
        """Queue again what failed, but not what the model's safety checker refused."""
        codes = self._farm.failures(found.id)
        if self._recipe.gates.safety == "reject":
            codes.pop(PictureBlocked.code, None)
        for code in codes:
            self._farm.retry(found.id, code=code)
        if found.cancelled or found.counts["cancelled"]:
            self._farm.retry(found.id, cancelled=True)
