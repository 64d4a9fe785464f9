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


_SPDX = """
    AFL-3.0 AGPL-3.0 Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear BSL-1.0
    C-UDA-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0
    CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-2.0 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 CC-BY-ND-4.0
    CC-BY-SA-3.0 CC-BY-SA-4.0 CC0-1.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 CDLA-Sharing-1.0
    ECL-2.0 EPL-1.0 EPL-2.0 EUPL-1.1 EUPL-1.2 GPL-2.0 GPL-3.0 ISC LGPL-2.1 LGPL-3.0 MIT MPL-2.0
    MS-PL ODC-By-1.0 ODbL-1.0 OSL-3.0 PDDL-1.0 Unlicense WTFPL Zlib etalab-2.0
"""
_SPDX_OF = {name.lower(): name for name in _SPDX.split()} | {
    "c-uda": "C-UDA-1.0", "odbl": "ODbL-1.0", "odc-by": "ODC-By-1.0", "pddl": "PDDL-1.0",
}  # fmt: skip


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

    @property
    def spdx(self) -> str:
        """The licence as https://spdx.org/licenses spells it; empty for one that is not known."""
        return _SPDX_OF.get(self.licence.lower(), "")


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
