"""What pydantic and the operating system say, in the words of the farm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from farm.faults import sentence, unreadable


def _never(value: str) -> str:
    raise ValueError("there is none")


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(1, ge=1)
    share: float = 0.5
    yes: bool = True
    name: Annotated[str, Field(min_length=1)] = "a"
    kinds: Annotated[tuple[str, ...], Field(min_length=1)] = ("a",)
    never: Annotated[str, AfterValidator(_never)] = ""
    inner: dict[str, int] = {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": "many"}, "count: must be a whole number"),
        ({"count": 1.5}, "count: must be a whole number"),
        ({"count": 0}, "count: must be greater than or equal to 1"),
        ({"share": "half"}, "share: must be a number"),
        ({"yes": "perhaps"}, "yes: must be true or false"),
        ({"name": ""}, "name: is empty"),
        ({"name": 1}, "name: must be a text"),
        ({"kinds": []}, "kinds: name at least one"),
        ({"kinds": "a"}, "kinds: must be a list"),
        ({"never": "x"}, "never: there is none"),
        ({"inner": 1}, "inner: must be a table"),
        ({"inner": {"a": "b"}}, "inner.a: must be a whole number"),
        ({"other": 1}, "other: no such key"),
        (1, "entry: must be a table"),
    ],
)
def test_a_sentence_of_the_farm(given: object, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Table.model_validate(given)
    assert [sentence(item) for item in caught.value.errors()] == [told]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, told in (("bytes", "it is not UTF-8 text"), ("gone", "No such file or directory")):
        with pytest.raises((OSError, ValueError)) as caught:
            (tmp_path / name).read_text(encoding="utf-8")
        assert unreadable(caught.value) == told
