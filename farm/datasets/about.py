"""What is told of a whole dataset: the recipe's section [card], and the facts of a run.

`farm.datasets.card` makes a README of it, `farm.datasets.croissant` metadata for machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from farm.spec import refuse_controls


def _one_line(text: str) -> str:
    if len(text.splitlines()) > 1:
        raise ValueError("more than one line")
    return text.strip()


_Text = Annotated[str, Field(max_length=20_000), AfterValidator(refuse_controls)]
_Line = Annotated[
    str, Field(max_length=300), AfterValidator(refuse_controls), AfterValidator(_one_line)
]
_Url = Annotated[str, Field(pattern=r"^(https?://[^\s<>\"`\\]+)?$", max_length=2_000)]
_Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9 ._:-]{0,62}$")]
_Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{1,8})*$")]
_Licence = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,62}$")]


class CardSection(BaseModel):
    """[card] of a recipe.

    `licence`: an identifier of SPDX (CC-BY-4.0) or of the Hub (openrail++); any other goes with a
    `licence_url`. `description`: paragraphs of plain text. `citation`: BibTeX.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    licence: _Licence
    licence_url: _Url = ""
    title: _Line = ""
    description: _Text = ""
    authors: tuple[Annotated[_Line, Field(min_length=1)], ...] = ()
    tags: tuple[_Tag, ...] = ()
    language: tuple[_Language, ...] = ()  # of the prompts
    homepage: _Url = ""
    citation: _Text = ""


@dataclass(frozen=True)
class ModelAbout:
    """A model, or a LoRA, that pictures were made with; the words are the catalogue's."""

    name: str
    licence: str
    licence_url: str = ""
    terms: str = ""
    attribution: str = ""
    description: str = ""
    engines: tuple[str, ...] = ()  # those that rendered; none named for a LoRA


@dataclass(frozen=True)
class About:
    """A dataset. No times are among it but `published`, so the same run tells the same.

    `columns`: its own, as its writers have them. `rows`: accepted pictures. `counts`: rows by
    outcome. `sizes`: pictures by WIDTHxHEIGHT. `forms`: of the pictures (png, webp, jpeg).
    `files`: how many and their bytes, by format. `published`: a date as 2026-11-30. `signed`: each
    picture has a C2PA manifest.
    """

    name: str
    section: CardSection
    models: tuple[ModelAbout, ...]
    formats: tuple[str, ...]
    columns: Mapping[str, type]
    rows: int
    counts: Mapping[str, int]
    shards: int
    sizes: Mapping[str, int]
    forms: tuple[str, ...] = ("png",)
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    recipe: str = ""
    version: str = "1.0.0"
    published: str = ""
    signed: bool = False

    @property
    def title(self) -> str:
        return self.section.title or self.name
