"""The sections of a recipe that say its rows: prompts, sampled fields, filters."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from farm.errors import InvalidPromptFile
from farm.prompt_files import ROW_FIELDS, guess_format
from farm.templates import Pick

Scalar = str | int | float | bool
Kind = Literal["text", "int", "float", "bool"]
KINDS: dict[Kind, type] = {"text": str, "int": int, "float": float, "bool": bool}


class Section(BaseModel):
    """A part of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    return text


def _texts(given: Any) -> Any:
    """A list of names: they hold texts."""
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        return dict.fromkeys(given, "text")
    return given


def _scalar(value: Any) -> Any:
    if not isinstance(value, Scalar):
        raise ValueError("expected a text, a number, true or false")
    return value


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("expected a number")
    return value


Values = Annotated[tuple[Annotated[Any, AfterValidator(_scalar)], ...], Field(min_length=1)]
Number = Annotated[Any, AfterValidator(_number)]


class Prompts(Section):
    """Where rows come from: a prompt file, or a template and lists of values for its holes.

    `columns`: field -> its name in the file. `keep`: what of the file goes into the dataset as it
    is: names, or names with their kinds; a template's lists go there by themselves. With either of
    them, the file's other names that are no fields of a job are left out.
    """

    file: Path | None = None
    format: Literal["jsonl", "csv", "tsv", "txt", "parquet"] | None = None
    columns: dict[str, str] = {}
    keep: Annotated[dict[str, Kind], BeforeValidator(_texts)] = {}
    template: str | None = None
    negative_prompt: str = ""
    pick: Pick = "matrix"
    count: Annotated[int, Field(ge=1)] | None = None
    lists: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        if (self.file is None) == (self.template is None):
            raise ValueError("give file or template, and not both")
        if self.file is None and (self.columns or self.keep or self.format):
            raise ValueError("format, columns and keep go with file")
        if self.template is None and (self.lists or self.negative_prompt or self.count):
            raise ValueError("lists, count and negative_prompt go with template")
        for name in self.columns:
            if name not in ROW_FIELDS:
                raise ValueError(f"columns: {name[:60]!r} is none of {', '.join(ROW_FIELDS)}")
        if self.file and not self.format:
            try:
                guess_format(self.file)
            except InvalidPromptFile as error:
                raise ValueError(error.message.replace("say --format", "say format")) from None
        return self


class Sampled(Section):
    """Values for a field: each row with every one (`each`), or with one drawn for it.

    `choice` draws evenly from a list; `uniform` from a range, both ends included, whole numbers if
    both ends are.
    """

    each: Values | None = None
    choice: Values | None = None
    uniform: tuple[Number, Number] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Sampled:
        if sum(one is not None for one in (self.each, self.choice, self.uniform)) != 1:
            raise ValueError("give one of each, choice or uniform")
        if self.uniform and self.uniform[0] > self.uniform[1]:
            raise ValueError("uniform: the first number must not be larger than the second")
        return self


class Filters(Section):
    """Which rows are left out, by their prompts. A row that is left out takes no place."""

    exclude: tuple[Annotated[str, AfterValidator(_pattern)], ...] = ()  # regular expressions
    min_chars: Annotated[int, Field(ge=0)] = 0
    max_chars: Annotated[int, Field(ge=1)] | None = None
    distinct: bool = False  # a prompt that stood before is left out
    limit: Annotated[int, Field(ge=1)] | None = None  # prompts taken, of those that are good
