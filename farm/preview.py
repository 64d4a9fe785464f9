"""What a submit would queue, and what it would cost; nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from farm.errors import RowError
from farm.spec import NewJob
from farm.store.costs import cost
from farm.store.db import Database

SAMPLES = 5
MOST_ERRORS = 1_000


@dataclass(frozen=True)
class Preview:
    """`seconds`: with the workers that live now; `size_bytes`: of all pictures. None: unknown.

    `unknown`: models of which no speed has been measured here yet. `samples`: the first jobs.
    """

    total: int
    by_model: dict[str, int]
    samples: list[dict[str, Any]]
    bad: int
    errors: list[RowError]
    seconds: float | None
    size_bytes: int | None
    unknown: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def preview(db: Database, stream: Iterable[NewJob | RowError]) -> Preview:
    """Read the whole stream, in bounded memory."""
    by_model: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    errors: list[RowError] = []
    bad = 0
    for item in stream:
        if isinstance(item, NewJob):
            by_model[item.shape.spec.model] += 1
            if len(samples) < SAMPLES:
                samples.append(item.spec.model_dump(mode="json", exclude_none=True))
            continue
        bad += 1
        if len(errors) < MOST_ERRORS:
            errors.append(item)
    with db.read() as connection:
        costs = {model: cost(connection, model) for model in by_model}
    unknown = sorted(model for model, known in costs.items() if known.seconds is None)
    unsized = any(known.size_bytes is None for known in costs.values())
    seconds = sum(n * (costs[model].seconds or 0) for model, n in by_model.items())
    size = sum(n * (costs[model].size_bytes or 0) for model, n in by_model.items())
    return Preview(
        total=by_model.total(),
        by_model=dict(by_model),
        samples=samples,
        bad=bad,
        errors=errors,
        seconds=None if unknown else seconds,
        size_bytes=None if unsized else round(size),
        unknown=unknown,
    )
