"""What a run would do: its rows and shards, what was rendered before, and what the rest costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from farm.catalog import Lane
from farm.datasets.batches import batch_key, rows_of, told_once
from farm.datasets.place import open_place
from farm.datasets.recipe import Recipe
from farm.datasets.rows import planned
from farm.errors import InvalidPromptFile, RowError, things_wrong
from farm.preview import MOST_ERRORS
from farm.service import Farm
from farm.spec import Fingerprints, NewJob
from farm.store import reuse, sessions
from farm.store.costs import cost

CHUNK = 1_000  # fingerprints looked up at once
SAMPLES = 5


@dataclass
class Plan:
    """`reused`: rows whose picture was rendered before, by the same weights: it would be linked.

    Of a run that was begun, `to_render` are the rows that are under way, and `failed` those that
    failed or were cancelled: a redrive queues them again. `unknown`: models that no worker has
    served here yet, so that nobody can tell what was rendered or how long it takes. `seconds`: of
    rendering what is left, with the workers of now; `size_bytes`: of all pictures; None: unknown.
    `batch`: of the run there is, if it was begun.
    """

    name: str
    label: str
    out: str
    rows: int = 0
    shards: int = 0
    formats: list[str] = field(default_factory=list)
    by_model: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    to_render: int = 0
    failed: int = 0
    seconds: float | None = None
    size_bytes: int | None = None
    unknown: list[str] = field(default_factory=list)
    batch: str | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(farm: Farm, recipe: Recipe, label: str = "") -> Plan:
    """Read the whole recipe; nothing is changed. Raises as `told_once` does for bad rows, and
    InvalidConfig for a place that cannot be one."""
    told = Plan(recipe.name, label, recipe.place(label), formats=list(recipe.formats))
    open_place(told.out, farm.settings).close()
    made = farm.made_by(recipe.owner, batch_key(farm.catalog, recipe, label))
    told.batch = made.id if made else None
    left: Counter[str] = Counter()
    by_model: Counter[str] = Counter()
    origins = _Origins(farm)
    stream = _good(farm.checked(rows_of(planned(recipe, label)), recipe.folder, **_given(recipe)))
    while chunk := _chunk(recipe, stream):
        there = origins.rendered(chunk)
        for job, done in zip(chunk, there, strict=True):
            model = job.shape.spec.model
            by_model[model] += 1
            left[model] += not done
        if len(told.samples) < SAMPLES:
            told.samples += [job.spec.model_dump(mode="json", exclude_none=True) for job in chunk]
            del told.samples[SAMPLES:]
    if made:
        left = Counter({m: n["queued"] + n["running"] for m, n in made.by_model.items()})
        told.failed = made.counts["failed"] + made.counts["cancelled"]
    told.rows, told.to_render = by_model.total(), left.total()
    told.reused = told.rows - told.to_render - told.failed
    told.by_model = dict(by_model)
    told.shards = -(-told.rows // recipe.shard_size)
    told.unknown = sorted(model for model in by_model if not origins.of(model))
    _estimate(farm, told, left)
    return told


def _chunk(recipe: Recipe, stream: Iterator[NewJob]) -> list[NewJob]:
    with told_once(recipe):
        return list(islice(stream, CHUNK))


def preview_rows(recipe: Recipe, label: str, n: int) -> list[dict[str, Any]]:
    """The fields of `n` rows, spread over the whole dataset; see `plan`'s rows for the errors."""
    total = sum(1 for _ in planned(recipe, label))
    step = max(1, total // n)
    chosen = islice(planned(recipe, label), 0, step * n, step)
    return [one.fields | {"n": 1} for one in chosen if not isinstance(one, RowError)]


def _given(recipe: Recipe) -> Any:
    return {**recipe.shared, "owner": recipe.owner}


def _good(stream: Iterable[NewJob | RowError]) -> Iterator[NewJob]:
    """Raises InvalidPromptFile at the end if a row was bad, or there was none."""
    errors: list[RowError] = []
    bad = good = 0
    for one in stream:
        if isinstance(one, NewJob):
            good += 1
            yield one
            continue
        bad += 1
        if len(errors) < MOST_ERRORS:
            errors.append(one)
    if bad:
        raise InvalidPromptFile(things_wrong(bad), errors)
    if not good:
        raise InvalidPromptFile("the recipe makes no row: its prompts are empty, or all filtered")


class _Origins:
    """With which weights a model's workers render, by engine; of those seen last."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._known: dict[str, dict[str, Fingerprints]] = {}

    def of(self, model: str) -> dict[str, Fingerprints]:
        if model not in self._known:
            entry = self._farm.catalog.get(model)
            with self._farm.db.read() as connection:
                found = {e: sessions.origin(connection, Lane(model, e)) for e in entry.engines}
            self._known[model] = {
                engine: Fingerprints(engine, weights, loras)
                for engine, (weights, loras) in ((e, o) for e, o in found.items() if o)
            }
        return self._known[model]

    def rendered(self, jobs: list[NewJob]) -> list[bool]:
        """Of each job, whether its picture is there, rendered by any engine that may."""
        marks = [self._marks(job) for job in jobs]
        wanted = sorted({mark for some in marks for mark in some})
        with self._farm.db.read() as connection:
            known = reuse.known(connection, wanted) if wanted else set()
        return [any(mark in known for mark in some) for some in marks]

    def _marks(self, job: NewJob) -> list[str]:
        spec, found = job.spec, []
        for engine, prints in self.of(spec.model).items():
            if spec.engine in (None, engine):
                try:
                    found.append(prints.of(spec))
                except KeyError:  # a LoRA that this engine's last worker did not have
                    continue
        return found


def _estimate(farm: Farm, told: Plan, left: Counter[str]) -> None:
    with farm.db.read() as connection:
        costs = {model: cost(connection, model) for model in told.by_model}
    if all(known.seconds is not None for m, known in costs.items() if left[m]):
        told.seconds = sum(n * (costs[model].seconds or 0) for model, n in left.items())
    if all(known.size_bytes is not None for known in costs.values()):
        told.size_bytes = round(
            sum(n * (costs[m].size_bytes or 0) for m, n in told.by_model.items())
        )
