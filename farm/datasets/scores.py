"""Scores of pictures by plug-ins.

A plug-in is `module:attribute`, of an installed package or of a file beside the recipe.
`attribute(**options)` is called once a run and gives an object with `score(image, prompt)`: a
number, for a PIL image in RGB. A recipe runs code as a Makefile does: read a stranger's first.
"""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.errors import FarmError, InvalidConfig

if TYPE_CHECKING:
    from PIL.Image import Image

Number = Annotated[float, Field(allow_inf_nan=False)]


class ScoreSection(BaseModel):
    """A plug-in's number for each picture, kept in the stats; outside of min..max it is rejected.

    `options` are the plug-in's own; paths in them are from the working directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    plugin: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")]
    min: Number | None = None
    max: Number | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _in_order(self) -> ScoreSection:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min must not be larger than max")
        return self

    def __str__(self) -> str:
        return f"gates.scores: {self.name} ({self.plugin})"


class Scorer(Protocol):
    """What a plug-in's attribute makes."""

    def score(self, image: Image, prompt: str) -> float: ...


class Score:
    """A plug-in at work, asked by one thread at a time, whoever shares it.

    `folder`: where it is looked for after the installed packages. Raises InvalidConfig when it
    cannot be loaded; a FarmError of its own goes through.
    """

    def __init__(self, told: ScoreSection, folder: Path | None) -> None:
        self._told, self._lock = told, Lock()
        if folder is not None and str(folder) not in sys.path:
            sys.path.append(str(folder))  # behind all others: it must not hide what is installed
        module, _, attribute = told.plugin.partition(":")
        try:
            self._scorer: Scorer = getattr(importlib.import_module(module), attribute)(
                **told.options
            )
        except FarmError:
            raise
        except Exception as error:  # whatever a person's own code raises
            raise InvalidConfig(f"{told} cannot be loaded: {words(error)}") from error
        if not callable(getattr(self._scorer, "score", None)):
            raise InvalidConfig(f"{told} makes an object without a method score(image, prompt)")

    def of(self, image: Image, prompt: str) -> float:
        """Raises InvalidConfig when the plug-in fails, or gives no finite number."""
        try:
            with self._lock:
                value = float(self._scorer.score(image, prompt))
        except FarmError:
            raise
        except Exception as error:  # whatever a person's own code raises
            raise InvalidConfig(f"{self._told} failed: {words(error)}") from error
        if not math.isfinite(value):
            raise InvalidConfig(f"{self._told} gave {value}, where a finite number must be")
        return value


def words(error: Exception) -> str:
    """An error's kind and first line, on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
