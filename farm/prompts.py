"""Rows of fields, from a prompt file, a template or Python, as a stream of new jobs.

Nothing is guessed and nothing is skipped: what is wrong is a RowError with its line, its field
and what was expected.
"""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from pydantic import ValidationError

from farm.abilities import narrowed
from farm.catalog import Catalog
from farm.checks import Link, chain, check_texts, normalise
from farm.errors import (
    InvalidParameter,
    InvalidPrompt,
    RowError,
    UnknownModel,
)
from farm.prompt_files import Row
from farm.spec import (
    DEFAULT_STRENGTH,
    EXPECTED,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    JobSpec,
    NewJob,
    Shape,
    engine_refuses,
    refuse_controls,
    row_errors,
)

MAX_PICTURES = 10_000
MOST_SHAPES = 10_000  # kept at once
_OWN = {"prompt", "negative_prompt", "seed", "n"}
_ASCII_BAD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def _no_pictures(given: str) -> str:
    raise InvalidParameter("input pictures cannot be given here")


@dataclass(frozen=True)
class Defaults:
    """What rows inherit: the submit's own options over the model's defaults.

    `take` makes an input picture's key in the blob store of what a row says of it; it raises
    InvalidParameter, which says what is wrong with it. `checks`: the chain for the texts.
    """

    given: Mapping[str, Any]
    n: int = 1
    take: Callable[[str], str] = _no_pictures
    checks: Sequence[Link] = chain()


def make_jobs(
    rows: Iterable[Row], defaults: Defaults, catalog: Catalog
) -> Iterator[NewJob | RowError]:
    """Jobs of the rows in order, `n` a row (their seeds counting up), or their errors.

    A row without a seed draws one of 32 bits, which the job then records.
    """
    return _Maker(defaults, catalog).jobs(rows)


class _Maker:
    """Checks each row; where only texts and seed differ from one that was good, only those."""

    def __init__(self, defaults: Defaults, catalog: Catalog) -> None:
        self._defaults, self._catalog = defaults, catalog
        self._shapes: dict[Any, Shape] = {}
        self._negative, self._seed = (defaults.given.get(k) for k in ("negative_prompt", "seed"))
        self._links = tuple(link for link in defaults.checks if link not in _SEEN_TO)

    def jobs(self, rows: Iterable[Row]) -> Iterator[NewJob | RowError]:
        for line, row in rows:
            if isinstance(row, RowError):
                yield row
                continue
            found = self._like_before(row) or self._slowly(line, row)
            if isinstance(found, list):
                yield from found
                continue
            job, n = found
            yield job
            for i in range(1, n):
                yield job._replace(seed=job.seed + i)

    def _like_before(self, row: Mapping[str, Any]) -> tuple[NewJob, int] | None:
        """The first of a row's jobs if its shape is known and its own fields are plainly good."""
        shape = self._shapes.get(_shape_key(row))
        if shape is None:
            return None
        prompt, negative, seed = row.get("prompt"), row.get("negative_prompt"), row.get("seed")
        n = row.get("n", self._defaults.n)
        if negative is None:
            negative = self._negative or ""
        if seed is None and (seed := self._seed) is None:
            seed = secrets.randbits(32)
        if type(seed) is not int or type(n) is not int or not 1 <= n <= MAX_PICTURES:
            return None
        if not 0 <= seed <= MAX_SEED + 1 - n:
            return None
        if self._is_good(prompt) and prompt.strip() and self._is_good(negative):
            return NewJob(shape, prompt, negative, seed), n
        return None

    def _is_good(self, text: Any) -> TypeGuard[str]:
        """Whether a text passes the checks as it is, without a doubt."""
        if type(text) is not str or len(text) > MAX_PROMPT_CHARS or _for_some_engines(text):
            return False
        if text.isascii():
            if _ASCII_BAD.search(text):
                return False
        elif not (text.isprintable() and unicodedata.is_normalized("NFC", text)):
            return False
        try:
            return all(link(text) == text for link in self._links)
        except ValueError:
            return False

    def _slowly(self, line: int, row: Mapping[str, Any]) -> tuple[NewJob, int] | list[RowError]:
        chosen = _row_spec(line, row, self._defaults, self._catalog)
        if isinstance(chosen, list):
            return chosen
        spec, n = chosen
        if _for_some_engines(spec.prompt) or _for_some_engines(spec.negative_prompt):
            return NewJob.of(spec), n  # its texts chose the engine: no shape for others
        key = _shape_key(row)
        shape = self._shapes.get(key) or Shape(spec)
        if key is not None:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        return NewJob(shape, spec.prompt, spec.negative_prompt, spec.seed), n


def _for_some_engines(text: str) -> bool:
    """Whether an engine does not take the text; most texts are plainly good."""
    return (len(text) > 1_000 or "<" in text) and engine_refuses("sdcpp", text) is not None


_SEEN_TO = (normalise, refuse_controls)  # by _is_good itself


def _shape_key(row: Mapping[str, Any]) -> Any:
    """Equal for rows that differ in texts, seed and n only; None for values of other kinds."""
    rest = [(k, type(v), v) for k, v in row.items() if k not in _OWN]
    if any(kind not in (str, int, float, bool) for _, kind, _ in rest):
        return None
    return tuple(rest)


def _row_spec(
    line: int, row: Mapping[str, Any], defaults: Defaults, catalog: Catalog
) -> tuple[JobSpec, int] | list[RowError]:
    """The first of a row's jobs and how many there are, or all that is wrong with the row."""
    fields = {**defaults.given, **{k: v for k, v in row.items() if v is not None}}
    n = fields.pop("n", defaults.n)
    if type(n) is not int or not 1 <= n <= MAX_PICTURES:
        return [RowError(line, "n", repr(n)[:60], f"a whole number from 1 to {MAX_PICTURES:,}")]
    model = fields.get("model")
    if not isinstance(model, str) or model not in catalog.models:
        known = ", ".join(sorted(catalog.models))
        return [RowError(line, "model", repr(model)[:60], f"one of {known}", UnknownModel.code)]
    chosen = _checked_spec(line, fields, n, defaults, catalog)
    return (chosen, n) if isinstance(chosen, JobSpec) else chosen


def _checked_spec(
    line: int, row: dict[str, Any], n: int, defaults: Defaults, catalog: Catalog
) -> JobSpec | list[RowError]:
    """The first of a row's `n` jobs, or all that is wrong with the row."""
    entry = catalog.models[row["model"]]
    fields = {**entry.defaults.model_dump(), **row}
    wrong = check_texts(line, fields, defaults.checks)
    wrong += _take_pictures(line, fields, defaults.take)
    if fields.get("seed") is None:
        fields["seed"] = secrets.randbits(32)
    try:
        spec = JobSpec(**fields)
    except ValidationError as error:
        told = {item.field for item in wrong}
        return wrong + [item for item in row_errors(line, error) if item.field not in told]
    if wrong:
        return wrong
    refused = entry.refusals(spec.model_dump())
    if spec.seed + n - 1 > MAX_SEED:
        refused["seed"] = EXPECTED["seed"] + f", also for the last of {n} pictures"
    chosen = refused or narrowed(spec, entry, catalog)
    if isinstance(chosen, JobSpec):
        return chosen
    values = {**spec.model_dump(), "loras": dict(spec.loras)}
    return [
        RowError(line, name, repr(values[name])[:60], told, _code(name))
        for name, told in chosen.items()
    ]


def _code(name: str) -> str:
    """The code of a fault of a field."""
    return (InvalidPrompt if name.endswith("prompt") else InvalidParameter).code


def _take_pictures(line: int, fields: dict[str, Any], take: Callable[[str], str]) -> list[RowError]:
    """Put input pictures' keys in the place of what the row said of them."""
    wrong = []
    for name in ("init_image", "mask_image"):
        given = fields.get(name)
        if isinstance(given, str | os.PathLike):
            try:
                fields[name] = take(os.fsdecode(given))
            except InvalidParameter as error:
                got = f"{os.fsdecode(given)[:60]!r}: {error.message}"
                wrong.append(RowError(line, name, got, EXPECTED[name]))
    if fields.get("init_image") and fields.get("strength") is None:
        fields["strength"] = DEFAULT_STRENGTH
    return wrong


def prompt_rows(prompts: Iterable[str | Mapping[str, Any]]) -> Iterator[Row]:
    """Rows from Python: a text, or a mapping of fields; counted from 1."""
    for number, item in enumerate(prompts, start=1):
        if isinstance(item, str):
            yield number, {"prompt": item}
        elif isinstance(item, Mapping):
            yield number, item
        else:
            expected = "a text or a mapping of fields"
            yield (
                number,
                RowError(number, "prompt", type(item).__name__, expected, InvalidPrompt.code),
            )


def row_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A job's fields as a row that asks for the same."""
    row = {name: value for name, value in spec.items() if value not in (None, ())}
    for name in {"init_image", "mask_image"} & set(row):
        row[name] = f"blob:{row[name]}"
    return row | ({"loras": dict(row["loras"])} if "loras" in row else {})
