"""The rows of a recipe, one picture each, in an order that never changes; and their seeds.

A row's seed follows from what it is, wherever it stands: the recipe's name and seed, the fields
that its prompt brings, which of the prompts alike it is, and the combination of `each` give a
number; the picture's and the attempt's are counted on from it:

    seed = (hash(recipe, prompt, combination) + picture * 32 + attempt) mod 2**63

No two pictures of a prompt, and no two attempts at one, have the same; two of a million rows have
it by chance once in 18 million datasets. Prompts and values that are added, removed or moved, more
pictures of each, and filters leave the seeds of the other rows as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

from farm.datasets.gates import MAX_ATTEMPTS
from farm.datasets.recipe import Recipe
from farm.datasets.sample import Value
from farm.datasets.sections import Sampled, Scalar
from farm.datasets.seen import Seen, mark_of
from farm.errors import InvalidConfig, RowError
from farm.prompt_files import guess_format, read_rows
from farm.prompts import MAX_PICTURES
from farm.spec import MAX_SEED

_SPACE = MAX_SEED + 1
_encode = json.JSONEncoder(sort_keys=True, default=str).encode


class Place(NamedTuple):
    """What a row's seed and drawn values follow from: marks of its prompt and combination, and the
    picture's number."""

    prompt: int
    combination: int
    picture: int


class Planned(NamedTuple):
    """A row as the recipe has it. `line`: of its prompt, from 1. `fields`: of its job, seed too."""

    line: int
    fields: dict[str, Any]
    columns: Mapping[str, Value]
    place: Place


class Seeds:
    """The seeds of one recipe and label."""

    def __init__(self, recipe: Recipe, label: str) -> None:
        told = f"{recipe.name}\0{recipe.seed}\0{label if recipe.fresh else ''}"
        self._told = told.encode()

    def of(self, place: Place, attempt: int = 0) -> int:
        """Of a row, the first or a further attempt at it."""
        base = mark_of(b"%s\0%d %d" % (self._told, place.prompt, place.combination))
        return (base + place.picture * MAX_ATTEMPTS + attempt) % _SPACE

    def draw(self, place: Place, field: str, given: Sampled) -> Any:
        """A value for a field of a row."""
        drawn = mark_of(b"%s\0%s\0%d %d %d" % (self._told, field.encode(), *place))
        if given.choice is not None:
            return given.choice[drawn * len(given.choice) >> 64]
        assert given.uniform is not None
        low, high = given.uniform
        if isinstance(low, int) and isinstance(high, int):
            return low + (drawn * (high - low + 1) >> 64)
        return min(max(float(f"{low + (high - low) * drawn / 2**64:.4g}"), low), high)


def planned(recipe: Recipe, label: str = "") -> Iterator[Planned | RowError]:
    """The recipe's rows in order, or what is wrong with its prompts.

    Raises InvalidConfig for a prompt file that cannot be read, InvalidParameter for its lists.
    """
    seeds, alike = Seeds(recipe, label), Seen()
    combinations = [dict(zip(recipe.each, v, strict=True)) for v in product(*recipe.each.values())]
    marks = [mark_of(_text(one)) for one in combinations]
    with _source(recipe) as source:
        for found in _chosen(recipe, source):
            if isinstance(found, RowError):
                yield found
                continue
            line, row, columns = found
            n = row.pop("n", None)
            n = recipe.pictures if n is None else n
            if type(n) is not int or not 1 <= n <= MAX_PICTURES:
                yield RowError(line, "n", repr(n)[:60], f"a whole number from 1 to {MAX_PICTURES}")
                continue
            prompt = (mark := mark_of(_text(row))) + alike.count(mark)
            for which, combination in zip(marks, combinations, strict=True):
                for picture in range(n):
                    place = Place(prompt, which, picture)
                    fields = _fields(recipe, seeds, place, combination | row)
                    yield Planned(line, fields, columns, place)


def _fields(recipe: Recipe, seeds: Seeds, place: Place, row: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if value is not None}
    for name, given in recipe.drawn.items():
        if name not in fields:
            fields[name] = seeds.draw(place, name, given)
    given_seed = fields.get("seed")
    if given_seed is None:
        fields["seed"] = seeds.of(place)
    elif isinstance(given_seed, int) and place.picture:
        fields["seed"] = given_seed + place.picture
    return fields


_Found = tuple[int, dict[str, Any], dict[str, Value]]


def _chosen(recipe: Recipe, source: Iterator[tuple[int, Any]]) -> Iterator[_Found | RowError]:
    """(line, fields, columns) of the rows that the filters leave."""
    told, taken = recipe.filters, 0
    seen = Seen()
    exclude = [re.compile(one) for one in told.exclude]
    kinds = recipe.columns
    for line, row in source:
        if told.limit is not None and taken >= told.limit:
            return
        if isinstance(row, RowError):
            yield row
            continue
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            if len(prompt) < told.min_chars or any(one.search(prompt) for one in exclude):
                continue
            if told.max_chars is not None and len(prompt) > told.max_chars:
                continue
            if told.distinct and not seen.add(mark_of(prompt), 0):
                continue
        taken += 1
        columns = _columns(line, row, kinds)
        if isinstance(columns, RowError):
            yield columns
            continue
        fields = {name: value for name, value in row.items() if name not in columns}
        yield line, fields, columns


def _columns(
    line: int, row: Mapping[str, Any], kinds: Mapping[str, type]
) -> dict[str, Value] | RowError:
    """The row's own columns, each of its kind or nothing."""
    found: dict[str, Value] = {}
    value: Any
    for name, kind in kinds.items():
        value = row.get(name)
        try:
            found[name] = None if value is None else _as(kind, value)
        except ValueError:
            return RowError(line, name, repr(value)[:60], f"{_SAID[kind]}, or nothing")
    return found


_SAID = {
    str: "a text", int: "a whole number of 64 bits", float: "a number", bool: "true or false",
}  # fmt: skip
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def _as(kind: type, value: Any) -> Value:
    """Raises ValueError. Texts of csv files are read as what they stand for."""
    if not isinstance(value, Scalar):
        raise ValueError(value)
    text = str(value)
    if kind is str or not text.strip():
        return text if kind is str else None
    if kind is bool and text.strip().lower() not in _TRUTH:
        raise ValueError(text)
    made: Value = _TRUTH[text.strip().lower()] if kind is bool else kind(text)
    if kind is int and not -(2**63) <= int(text) < 2**63:
        raise ValueError(text)
    return made


def _text(row: Mapping[str, Any]) -> str:
    """What a prompt brings, but for its seed."""
    told = {name: value for name, value in row.items() if value is not None and name != "seed"}
    return _encode(told)


@contextmanager
def _source(recipe: Recipe) -> Iterator[Iterator[tuple[int, Any]]]:
    """(line, fields and columns, or an error) of the source."""
    template, path = recipe.template, recipe.prompt_file
    if template is not None:
        yield _of_template(recipe)
        return
    assert path is not None
    told = recipe.prompts
    names = {**{name: name for name in told.keep}, **told.columns}
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    with stream:
        rows = read_rows(stream, told.format or guess_format(path), names or None)
        yield ((line, row if isinstance(row, RowError) else dict(row)) for line, row in rows)


def _of_template(recipe: Recipe) -> Iterator[tuple[int, dict[str, Any]]]:
    template = recipe.template
    assert template is not None
    holes, columns = template.holes, recipe.columns
    for line, values in template.named():
        row = {name: value for name, value in values.items() if name not in holes}
        kept = {name: values[name] for name in columns}
        yield line, row | kept | template.texts(values)
