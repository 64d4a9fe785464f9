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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from pydantic import AfterValidator, Field, ValidationError, model_validator

from farm import faults
from farm.datasets.card import CardSection
from farm.datasets.formats import FORMATS, check_columns
from farm.datasets.gates import GatesSection
from farm.datasets.sections import KINDS, Filters, Prompts, Sampled, Scalar, Section
from farm.errors import InvalidConfig, InvalidParameter
from farm.inputs import absolute
from farm.notify import NotifySection
from farm.prompt_files import ROW_FIELDS
from farm.prompts import MAX_PICTURES
from farm.spec import FIELDS, NAME_PATTERN
from farm.submitting import MAX_PRIORITY
from farm.templates import Template, parse_list

MAX_BYTES = 16 * 2**20
MAX_COMBINATIONS = 1_000  # of the values that each row is rendered with
MAX_SHARD = 1_000_000
_SEEDS = 2  # raised when rows have other seeds than before
_LABEL = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


def check_label(label: str) -> str:
    """A run's label, or nothing: it stands in paths and keys. Raises InvalidParameter."""
    if label and not _LABEL.fullmatch(label):
        raise InvalidParameter(
            f"label {label[:80]!r}: expected small letters, digits and . _ - between them, 63 at "
            "most"
        )
    return label


def _place(out: str) -> str:
    if "://" in out and not out.startswith("s3://"):
        raise ValueError("expected a directory, or s3://bucket/prefix")
    if "\0" in out:
        raise ValueError("holds a NUL")
    try:
        Path(out).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return out


class Recipe(Section):
    """A dataset, as a person writes it. Paths are from the recipe's own directory."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    out: Annotated[str, Field(min_length=1), AfterValidator(_place)]
    owner: str = ""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = -10
    pictures: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    fresh: bool = False  # new seeds for each label, so that every night has pictures of its own
    shard_size: Annotated[int, Field(ge=1, le=MAX_SHARD)] = 1_000
    formats: Annotated[tuple[str, ...], Field(min_length=1)] = ("webdataset",)
    prompts: Prompts
    params: Annotated[dict[str, Any], Field(default_factory=dict)]
    sampled: Annotated[dict[str, Sampled], Field(default_factory=dict)]  # of params
    filters: Filters = Filters()
    gates: GatesSection = GatesSection()
    card: CardSection
    notify: NotifySection | None = None

    folder: Annotated[Path, Field(exclude=True)] = Path()
    text: Annotated[str, Field(exclude=True)] = ""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("params"), dict):
            params = given["params"]
            sampled = {k: v for k, v in params.items() if isinstance(v, dict) and k != "loras"}
            plain = {k: v for k, v in params.items() if k not in sampled}
            given = {**given, "params": plain, "sampled": sampled}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise ValueError(f"formats: {unknown[0]!r} is none of {', '.join(FORMATS)}")
        if "parquet" in self.formats and find_spec("pyarrow") is None:
            raise ValueError("formats: parquet needs pyarrow: pip install 'renderfarm[dataset]'")
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("formats: one stands twice")
        for name in (*self.params, *self.sampled):
            if name not in FIELDS or name in ("prompt", "seed"):
                known = ", ".join(f for f in FIELDS if f not in ("prompt", "seed"))
                raise ValueError(f"params: {name[:60]!r} is none of {known}")
        if not self.models:
            raise ValueError("params: model is missing")
        if self.fresh and "{label}" not in self.out:
            raise ValueError(
                "out: with fresh = true it needs {label}, such as sets/{label}: each label has "
                "pictures of its own, which would be written over those of the one before"
            )
        if self.combinations > MAX_COMBINATIONS:
            raise ValueError(f"params: {self.combinations:,} combinations of `each`; at most 1,000")
        return self

    @cached_property
    def each(self) -> dict[str, tuple[Scalar, ...]]:
        """The fields of which a row has every value."""
        return {k: v.each for k, v in self.sampled.items() if v.each is not None}

    @cached_property
    def drawn(self) -> dict[str, Sampled]:
        """The fields of which a row has one value that is drawn for it."""
        return {k: v for k, v in self.sampled.items() if v.each is None}

    @property
    def shared(self) -> dict[str, Any]:
        """The fields that are alike in all rows, unless a row has its own."""
        pictures = {
            name: absolute(given, self.folder)
            for name in ("init_image", "mask_image")
            if isinstance(given := self.params.get(name), str)
        }
        return self.params | pictures

    def _inputs(self) -> Iterator[Path]:
        """The files of pictures that [params] names."""
        for name in ("init_image", "mask_image"):
            for one in self._given(name):
                path = Path(absolute(str(one), self.folder))
                if path.is_absolute():  # else it names an object, or a job's picture
                    yield path

    def _given(self, name: str) -> Sequence[Any]:
        """The values that [params] has for a field, but for ranges."""
        sampled = self.sampled.get(name)
        if sampled:
            return sampled.each or sampled.choice or ()
        return [self.params[name]] if name in self.params else []

    @property
    def models(self) -> list[Any]:
        """The models that it names; rows of a file may name others."""
        listed = self.prompts.lists.get("model")
        some = [*self._given("model"), *(listed if isinstance(listed, list) else [listed])]
        return [one for one in some if one is not None]

    def gives(self, name: str, got: str) -> bool:
        """Whether rows have this value of a field, told as errors tell it, from [params]."""
        sampled = self.sampled.get(name)
        if sampled and sampled.uniform is not None:
            with suppress(ValueError):
                low, high = sampled.uniform
                return bool(low <= float(got.partition(":")[0]) <= high)
            return False
        return any(_is_told(one, got) for one in self._given(name))

    @property
    def combinations(self) -> int:
        n = 1
        for values in self.each.values():
            n *= len(values)
        return n

    @cached_property
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

    @cached_property
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
        out = self.out.replace("{label}", check_label(label))
        if out.startswith("s3://"):
            return out
        return str((self.folder / Path(out).expanduser()).absolute())

    @cached_property
    def public_text(self) -> str:
        """The recipe as TOML without what may hold secrets: comments, [notify], scores' options."""
        told = {k: v for k, v in tomllib.loads(self.text).items() if k != "notify"}
        for score in told.get("gates", {}).get("scores", ()):
            score.pop("options", None)
        plain = {k: v for k, v in told.items() if not isinstance(v, dict)}
        return tomlkit.dumps(plain | told)

    @property
    def public_sha256(self) -> str:
        return hashlib.sha256(self.public_text.encode()).hexdigest()

    def digest(self, label: str, defaults: Mapping[str, Any] | None = None) -> str:
        """SHA-256 of all that decides which rows there are and what they render, for one label.

        `defaults`: of the models, as the catalogue has them.
        """
        parts = ("name", "pictures", "seed", "fresh", "prompts", "params", "sampled", "filters")
        told = self.model_dump(mode="json", include=set(parts))
        template, file = self.template, self.prompt_file
        lists = {n: _mark(values) for n, values in template.lists.items()} if template else {}
        told |= {"label": label, "lists": lists, "file": file and _sha256(file)}
        told["inputs"] = [_sha256(path) for path in self._inputs()]
        text = json.dumps(told | {"defaults": defaults or {}, "seeds": _SEEDS}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _list(name: str, given: Any, folder: Path) -> Any:
    """The values of a template's list. Raises InvalidParameter."""
    if isinstance(given, str):
        told = f"@{folder / given[1:]}" if given.startswith("@") else given
        return parse_list(f"{name}={told}")[1]
    if isinstance(given, list) and all(isinstance(one, Scalar) for one in given):
        return given
    raise InvalidParameter(f'list {name!r}: expected ["a", "b"], "1..100" or "@FILE"')


def _mark(values: Sequence[Scalar]) -> list[Any]:
    """What tells the values of a list, however long a range it is."""
    return [values.start, values.stop] if isinstance(values, range) else [list(values)]


def _kind_of(values: Sequence[Scalar]) -> type:
    kinds = {int} if isinstance(values, range) else {type(one) for one in values}
    if kinds <= {int, float}:
        return float if float in kinds else int
    return bool if kinds == {bool} else str


def _is_told(value: Any, got: str) -> bool:
    """Whether an error that tells `got` is about this value: long ones are cut there."""
    shown = repr(value)
    return got == shown or got.startswith((f"{shown}: ", shown[:57] if len(shown) > 60 else "\0"))


def _sha256(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InvalidConfig(f"{path} is no plain file; rows are read more than once")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises InvalidConfig with each wrong key and what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InvalidConfig(f"{path}: a recipe has at most {MAX_BYTES >> 20} MiB")
        text = data.decode("utf-8-sig")
        told = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{path}: {faults.unreadable(error)}") from None
    except RecursionError as error:
        raise InvalidConfig(f"{path}: {error}") from None
    if bad := {"folder", "text", "sampled"} & set(told):
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
    where = faults.where(item).replace("sampled.", "params.", 1)
    what = faults.what(item)
    if item["type"] == "string_pattern_mismatch" and where == "name":
        what = "expected small letters, digits, - and _, 63 at most"
    given = repr(item["input"])
    told = item["type"] not in ("extra_forbidden", "missing", "string_too_short")
    secret = where.startswith("notify") or len(given) > 60 or not where
    got = f" (got {given})" if told and not secret else ""
    return f"{where}: {what}{got}" if where else f"{what}{got}"
