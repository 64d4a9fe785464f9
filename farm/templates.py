"""Prompt templates: "a {colour} {animal}" and lists of values, as a stream of rows.

    Template("a {colour} {animal}", {"colour": ["red", "blue"], "animal": ["cat", "dog"]})

gives four rows. A list whose name is no hole of the template but a field of a job varies that
field: {"steps": [10, 20], "seed": range(1, 101)}. `{{` and `}}` are braces.
"""

from __future__ import annotations

import random
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

from farm.errors import InvalidParameter
from farm.faults import unreadable
from farm.spec import FIELDS

Pick = Literal["matrix", "zip", "sample"]
PICKS: tuple[Pick, ...] = ("matrix", "zip", "sample")
MOST_ROWS = 100_000_000
MAX_FILE_BYTES = 64 * 2**20
_HOLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RANGE = re.compile(r"(\d{1,19})\.\.(\d{1,19})")
_TEXTS = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class Template:
    """Texts with holes, and a list of values for each hole.

    `pick`: every combination (matrix), the lists side by side (zip), or `count` rows, each with a
    value of every list drawn evenly by `seed` (sample). Raises InvalidParameter when the holes and
    the lists do not fit together.
    """

    prompt: str
    lists: Mapping[str, Sequence[Any]]
    negative_prompt: str = ""
    pick: Pick = "matrix"
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        holes = self.holes
        if missing := sorted(holes - set(self.lists)):
            raise InvalidParameter(f"template: no list for {{{'}, {'.join(missing)}}}")
        for name, values in self.lists.items():
            if name not in holes and (name not in FIELDS or name in _TEXTS):
                raise InvalidParameter(
                    f"list {name[:80]!r}: neither {{{name[:80]}}} stands in the template nor is "
                    f"it a field of a job ({', '.join(f for f in FIELDS if f not in _TEXTS)})"
                )
            if not len(values):
                raise InvalidParameter(f"list {name!r}: there is nothing in it")
        if (self.count is not None) != (self.pick == "sample"):
            raise InvalidParameter("a count goes with pick = sample, which needs one")
        lengths = {len(values) for values in self.lists.values()}
        if self.pick == "zip" and len(lengths) > 1:
            told = ", ".join(f"{name} {len(values):,}" for name, values in self.lists.items())
            raise InvalidParameter(f"zip needs lists of one length, these have: {told}")
        if not 1 <= self.total <= MOST_ROWS:
            raise InvalidParameter(f"template: {self.total:,} rows; 1 to {MOST_ROWS:,} are allowed")

    @property
    def total(self) -> int:
        """How many rows there are."""
        if self.count is not None:
            return self.count
        lengths = [len(values) for values in self.lists.values()]
        return prod(lengths) if self.pick == "matrix" else max(lengths, default=1)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, fields of a job), the last list turning fastest."""
        holes = self.holes
        for number, named in self.named():
            row = {name: value for name, value in named.items() if name not in holes}
            yield number, row | self.texts(named)

    def named(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, a value of each list), the last list turning fastest."""
        for number, values in enumerate(self._combinations(), start=1):
            yield number, dict(zip(self.lists, values, strict=True))

    def texts(self, named: Mapping[str, Any]) -> dict[str, str]:
        """The prompts with these values in their holes."""
        found = {"prompt": self.prompt.format_map(named)}
        if self.negative_prompt:
            found["negative_prompt"] = self.negative_prompt.format_map(named)
        return found

    @property
    def holes(self) -> set[str]:
        """The names in braces."""
        return holes_of(self.prompt) | holes_of(self.negative_prompt)

    def _combinations(self) -> Iterator[Sequence[Any]]:
        columns = list(self.lists.values())
        if self.pick == "matrix":
            yield from product(*columns)
        elif self.pick == "zip":
            yield from zip(*columns, strict=True)
        else:
            draw = random.Random(self.seed)
            for _ in range(self.total):
                yield [column[draw.randrange(len(column))] for column in columns]


def holes_of(text: str) -> set[str]:
    """The names in braces. Raises InvalidParameter for a brace that is none of ours."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InvalidParameter(
            f"template {text[:60]!r}: {error}; a brace itself is written twice, as {{{{ or }}}}"
        ) from None
    names = {name for _, name, _, _ in parts if name is not None}
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not _HOLE.fullmatch(name)):
            raise InvalidParameter(
                f"template {text[:60]!r}: {{{name[:40]}}} is no plain name; a brace itself is "
                "written twice, as {{ or }}"
            )
    return names


def parse_list(text: str) -> tuple[str, Sequence[Any]]:
    """A list as it is given on a command line; raises InvalidParameter.

    NAME=red,blue  values, those of a number field as numbers
    NAME=1..100    whole numbers, both ends included
    NAME=@FILE     one value a line of a UTF-8 file; blank lines and those that begin with # not
    """
    name, equals, given = text.partition("=")
    name = name.strip()
    if not equals or not _HOLE.fullmatch(name):
        raise InvalidParameter(
            f"list {text[:60]!r}: expected NAME=a,b,c or NAME=1..100 or NAME=@FILE"
        )
    if given.startswith("@"):
        values: Sequence[str] = _file_values(name, Path(given[1:]))
    elif found := _RANGE.fullmatch(given.strip()):
        first, last = int(found[1]), int(found[2])
        if last < first:
            raise InvalidParameter(f"list {name!r}: {given} runs backwards")
        if last - first >= sys.maxsize:
            raise InvalidParameter(f"list {name!r}: {given} is too long")
        return name, range(first, last + 1)
    else:
        values = [value.strip() for value in given.split(",") if value.strip()]
    return name, [_number(value) for value in values] if name in FIELDS else values


def _file_values(name: str, path: Path) -> list[str]:
    try:
        if not path.is_file():
            raise InvalidParameter(f"list {name!r}: {path} is no file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidParameter(f"list {name!r}: {path} is over {MAX_FILE_BYTES >> 20} MiB")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"list {name!r}: {path}: {unreadable(error)}") from None
    return [line for line in lines if line and not line.startswith("#")]


def _number(text: str) -> Any:
    """A whole number or a number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
