"""A recipe: the TOML file that says a whole dataset.

    name = "shapes"
    out = "datasets/shapes"            # a directory beside this file, or s3://bucket/prefix
    pictures = 4                       # of each prompt
    seed = 7                           # each row's seed derives from it

    [prompts]
    template = "a {colour} {shape}"    # or: file = "prompts.jsonl"
    [prompts.lists]
    colour = ["red", "blue"]
    shape = "@shapes.txt"

    [params]                           # fields of a job, alike for all rows or sampled
    model = "shapes"
    guidance_scale = { uniform = [3, 6] }

`farm dataset init` writes one with every section explained.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from farm.datasets.card import CardSection
from farm.datasets.formats import FORMATS, check_columns
from farm.datasets.gates import GatesSection
from farm.errors import InvalidConfig, InvalidParameter
from farm.notify import NotifySection
from farm.prompt_files import ROW_FIELDS
from farm.prompts import MAX_PICTURES
from farm.spec import FIELDS, NAME_PATTERN
from farm.templates import Pick, Template, parse_list

MAX_BYTES = 16 * 2**20
MAX_COMBINATIONS = 1_000  # of the values that each row is rendered with
MAX_SHARD = 1_000_000
LABEL_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _pattern(text: str) -> str:
    re.compile(text)
    return text


def _texts(given: Any) -> Any:
    """A list of names: they hold texts."""
    return dict.fromkeys(given, "text") if isinstance(given, list) else given


Scalar = str | int | float | bool
Kind = Literal["text", "int", "float", "bool"]
KINDS: dict[Kind, type] = {"text": str, "int": int, "float": float, "bool": bool}


class Prompts(_Section):
    """Where rows come from: a prompt file, or a template and lists of values for its holes.

    `columns`: field -> its name in the file. `keep`: what of the file goes into the dataset as it
    is: names, or names with their kinds; a template's lists go there by themselves.
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
        return self


class Sampled(_Section):
    """Values for a field: each row with every one (`each`), or with one drawn for it.

    `choice` draws evenly from a list; `uniform` from a range, both ends included, whole numbers if
    both ends are.
    """

    each: Annotated[tuple[Scalar, ...], Field(min_length=1)] | None = None
    choice: Annotated[tuple[Scalar, ...], Field(min_length=1)] | None = None
    uniform: tuple[int | float, int | float] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Sampled:
        if sum(one is not None for one in (self.each, self.choice, self.uniform)) != 1:
            raise ValueError("give one of each, choice or uniform")
        if self.uniform and not self.uniform[0] <= self.uniform[1]:
            raise ValueError("uniform: the first number must not be larger than the second")
        return self


class Filters(_Section):
    """Which rows are left out, by their prompts. A row that is left out takes no place."""

    exclude: tuple[Annotated[str, AfterValidator(_pattern)], ...] = ()  # regular expressions
    min_chars: Annotated[int, Field(ge=0)] = 0
    max_chars: Annotated[int, Field(ge=1)] | None = None
    distinct: bool = False  # a prompt that stood before is left out
    limit: Annotated[int, Field(ge=1)] | None = None  # prompts taken, of those that are good


class Recipe(_Section):
    """A dataset, as a person writes it. Paths are from the recipe's own directory."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    out: Annotated[str, Field(min_length=1)]
    owner: str = ""
    priority: int = -10
    pictures: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    fresh: bool = False  # new seeds for each label, so that every night has pictures of its own
    shard_size: Annotated[int, Field(ge=1, le=MAX_SHARD)] = 1_000
    formats: Annotated[tuple[str, ...], Field(min_length=1)] = ("webdataset",)
    prompts: Prompts
    params: dict[str, Any] = {}
    filters: Filters = Filters()
    gates: GatesSection = GatesSection()
    card: CardSection
    notify: NotifySection | None = None

    folder: Annotated[Path, Field(exclude=True)] = Path()
    text: Annotated[str, Field(exclude=True)] = ""

    @model_validator(mode="before")
    @classmethod
    def _samples(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("params"), dict):
            told = {k: Sampled(**v) if _is_sampled(k, v) else v for k, v in given["params"].items()}
            given = {**given, "params": told}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise ValueError(f"formats: {unknown[0]!r} is none of {', '.join(FORMATS)}")
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("formats: one stands twice")
        for name in self.params:
            if name not in FIELDS or name in ("prompt", "seed"):
                known = ", ".join(f for f in FIELDS if f not in ("prompt", "seed"))
                raise ValueError(f"params: {name[:60]!r} is none of {known}")
        if self.combinations > MAX_COMBINATIONS:
            raise ValueError(f"params: {self.combinations:,} combinations of `each`; at most 1,000")
        return self

    @property
    def each(self) -> dict[str, tuple[Scalar, ...]]:
        """The fields of which a row has every value."""
        return {k: v.each for k, v in self._sampled.items() if v.each is not None}

    @property
    def drawn(self) -> dict[str, Sampled]:
        """The fields of which a row has one value that is drawn for it."""
        return {k: v for k, v in self._sampled.items() if v.each is None}

    @property
    def shared(self) -> dict[str, Any]:
        """The fields that are alike in all rows, unless a row has its own."""
        return {k: v for k, v in self.params.items() if not isinstance(v, Sampled)}

    @property
    def _sampled(self) -> dict[str, Sampled]:
        return {k: v for k, v in self.params.items() if isinstance(v, Sampled)}

    @property
    def combinations(self) -> int:
        n = 1
        for values in self.each.values():
            n *= len(values)
        return n

    @property
    def template(self) -> Template | None:
        """Raises InvalidParameter when the holes and the lists do not fit together."""
        told = self.prompts
        if told.template is None:
            return None
        lists = {name: _list(name, given, self.folder) for name, given in told.lists.items()}
        seeded: Any = {"seed": self.seed} if told.pick == "sample" else {}
        return Template(
            told.template, lists, told.negative_prompt, pick=told.pick, count=told.count, **seeded
        )

    @property
    def columns(self) -> dict[str, type]:
        """What goes along from the prompts into the dataset, with its types."""
        template = self.template
        if template is None:
            return {name: KINDS[kind] for name, kind in self.prompts.keep.items()}
        own = {n: v for n, v in template.lists.items() if n not in ROW_FIELDS}
        return {name: _kind_of(values) for name, values in own.items()}

    @property
    def prompt_file(self) -> Path | None:
        return self.folder / self.prompts.file if self.prompts.file else None

    def place(self, label: str) -> str:
        """Where the dataset of a label goes: an absolute directory, or an s3:// URL."""
        if "{label}" in self.out and not label:
            raise InvalidParameter(
                f"out = {self.out!r} has a place for the run's label; give one, as in --label "
                f"{date.today().isoformat()}"
            )
        out = self.out.replace("{label}", label)
        return out if out.startswith("s3://") else str((self.folder / out).absolute())

    @property
    def public_text(self) -> str:
        """The file as it was written, without [notify]: a webhook's URL may be a secret."""
        document = tomlkit.parse(self.text)
        document.pop("notify", None)
        return document.as_string()

    def digest(self, label: str) -> str:
        """SHA-256 of all that decides which rows there are and what they render, for one label."""
        parts = ("name", "pictures", "seed", "fresh", "prompts", "params", "filters")
        told = self.model_dump(mode="json", include=set(parts))
        template, file = self.template, self.prompt_file
        lists = {n: list(v) for n, v in template.lists.items()} if template else {}
        told |= {"label": label, "lists": lists, "file": file and _sha256(file)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _is_sampled(name: str, value: Any) -> bool:
    return name != "loras" and isinstance(value, dict)


def _list(name: str, given: Any, folder: Path) -> Any:
    """The values of a template's list. Raises InvalidParameter."""
    if isinstance(given, str):
        told = f"@{folder / given[1:]}" if given.startswith("@") else given
        return parse_list(f"{name}={told}")[1]
    if isinstance(given, list) and all(isinstance(one, Scalar) for one in given):
        return given
    raise InvalidParameter(f'list {name!r}: expected ["a", "b"], "1..100" or "@FILE"')


def _kind_of(values: Sequence[Scalar]) -> type:
    kinds = {int} if isinstance(values, range) else {type(one) for one in values}
    if kinds <= {int, float}:
        return float if float in kinds else int
    return bool if kinds == {bool} else str


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises InvalidConfig with each wrong key and what is wrong with it."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise InvalidConfig(f"{path}: a recipe has at most {MAX_BYTES >> 20} MiB")
        text = data.decode("utf-8-sig")
        told = tomllib.loads(text)
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"{path}: {error}") from None
    if bad := {"folder", "text"} & set(told):
        raise InvalidConfig(f"{path}: {bad.pop()}: no such key")
    try:
        recipe = Recipe(**told, folder=path.absolute().parent, text=text)
        check_columns(recipe.columns)
    except ValidationError as error:
        lines = [_sentence(item) for item in error.errors(include_url=False, include_context=False)]
        raise InvalidConfig("\n  ".join([f"{path}: the recipe is wrong:", *lines])) from None
    except InvalidParameter as error:
        raise InvalidConfig(f"{path}: {error.message}") from None
    return recipe


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    what = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{where}: no such key"
    if item["type"] == "missing":
        return f"{where}: is missing"
    if item["type"] == "string_pattern_mismatch" and where == "name":
        what = "expected small letters, digits, - and _, 63 at most"
    given = repr(item["input"])
    return f"{where}: {what}" + (f" (got {given})" if len(given) <= 60 else "")
