"""One row of a dataset as it goes into a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """An accepted picture and what is told of it.

    `row`: its place in the dataset, from 0; it names its files and never changes. `data`: the
    picture's file, whose SHA-256 is `sha256`, in `form` (png, webp or jpeg). `params`: the job's
    fields (farm.spec.FIELDS) as JSON has them, those that are None or empty left out. `columns`:
    what the recipe carries along from the prompts, the same names in every sample.
    """

    row: int
    data: bytes
    form: str
    sha256: str
    params: Mapping[str, Any]
    columns: Mapping[str, Value] = field(default_factory=dict)
