"""What became of a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from farm.datasets.sample import Sample, Value
from farm.spec import FIELDS
from farm.store.reads import Job

_EMPTY = (None, "", ())
ACCEPTED, REJECTED, FAILED, CANCELLED = STATES = ("accepted", "rejected", "failed", "cancelled")


@dataclass(frozen=True)
class Try:
    """A picture, or a failure to make one, that was not accepted. `gate`: which one said no."""

    seed: int
    gate: str
    why: str
    sha256: str | None = None


@dataclass
class Outcome:
    """A row's, once nothing more is tried. `jobs`: those of its attempts, one after the other."""

    row: int
    state: str
    jobs: list[Job]
    columns: Mapping[str, Value]
    tries: list[Try] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """The last one; its picture is the accepted one."""
        return self.jobs[-1]

    @cached_property
    def params(self) -> dict[str, Any]:
        """The last job's fields as JSON has them, without what is None or empty."""
        spec = self.job.spec
        return {name: spec[name] for name in FIELDS if spec[name] not in _EMPTY}

    @cached_property
    def mark(self) -> str:
        """16 hex digits that tell what was asked for, whatever its place in the dataset."""
        return hashlib.sha256(json.dumps(self.params, sort_keys=True).encode()).hexdigest()[:16]

    def sample(self, data: bytes) -> Sample:
        """An accepted row with its picture."""
        assert self.job.sha256
        form = str(self.job.spec["format"])
        return Sample(self.row, data, form, self.job.sha256, self.params, self.columns)
