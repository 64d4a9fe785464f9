from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from farm.errors import InvalidParameter
from farm.templates import Template, parse_list

COLOURS, ANIMALS = ["red", "blue"], ["cat", "dog", "eel"]


def prompts(template: Template) -> list[str]:
    return [row["prompt"] for _, row in template.rows()]


def test_matrix_gives_every_combination_in_order() -> None:
    template = Template("a {c} {a}", {"c": COLOURS, "a": ANIMALS})
    assert template.total == 6
    assert prompts(template)[:4] == ["a red cat", "a red dog", "a red eel", "a blue cat"]


def test_zip_goes_side_by_side() -> None:
    template = Template("a {c} {a}", {"c": COLOURS, "a": ANIMALS[:2]}, pick="zip")
    assert prompts(template) == ["a red cat", "a blue dog"]


def test_sample_draws_the_same_rows_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[str]:
        lists = {"c": COLOURS, "a": ANIMALS}
        return prompts(Template("{c} {a}", lists, pick="sample", count=60, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 60
    assert set(drawn(1)) == {f"{c} {a}" for c in COLOURS for a in ANIMALS}


def test_a_list_may_vary_a_field() -> None:
    template = Template("a cat", {"steps": [10, 20], "seed": range(5, 7)})
    assert [row for _, row in template.rows()] == [
        {"steps": steps, "seed": seed, "prompt": "a cat"} for steps in (10, 20) for seed in (5, 6)
    ]


def test_holes_of_the_negative_prompt_and_plain_braces() -> None:
    template = Template("a {{c}} {a}", {"a": ["cat"], "bad": ["blur"]}, negative_prompt="no {bad}")
    (row,) = [row for _, row in template.rows()]
    assert row == {"prompt": "a {c} cat", "negative_prompt": "no blur"}


def test_a_hundred_million_rows_come_as_a_stream() -> None:
    template = Template("{a}", {"a": range(10_000), "seed": range(10_000)})
    assert template.total == 10**8
    assert next(islice(template.rows(), 20_000, None))[1] == {"prompt": "2", "seed": 0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": "a {c}", "lists": {}}, "no list for {c}"),
        ({"prompt": "a {c}", "lists": {"c": []}}, "nothing in it"),
        ({"prompt": "a", "lists": {"c": ["x"]}}, "neither {c}"),
        ({"prompt": "a", "lists": {"prompt": ["x"]}}, "neither {prompt}"),
        ({"prompt": "a {c", "lists": {"c": ["x"]}}, "written twice"),
        ({"prompt": "a {c.x}", "lists": {"c": ["x"]}}, "no plain name"),
        ({"prompt": "a {c!r}", "lists": {"c": ["x"]}}, "no plain name"),
        ({"prompt": "a {}", "lists": {"c": ["x"]}}, "no plain name"),
        ({"prompt": "{c} {a}", "lists": {"c": "xy", "a": "x"}, "pick": "zip"}, "c 2, a 1"),
        ({"prompt": "{c}", "lists": {"c": "xy"}, "pick": "sample"}, "count"),
        ({"prompt": "{c}", "lists": {"c": "xy"}, "count": 3}, "count"),
        ({"prompt": "{c}", "lists": {"c": "xy"}, "pick": "sample", "count": 0}, "0 rows"),
        ({"prompt": "{c}", "lists": {"c": range(10**9)}}, "1,000,000,000 rows"),
    ],
)
def test_what_does_not_fit_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidParameter, match=r".*") as caught:
        Template(**given)
    assert told in caught.value.message


def test_lists_as_given_on_a_command_line(tmp_path: Path) -> None:
    assert parse_list("colour=red, blue,") == ("colour", ["red", "blue"])
    assert parse_list("seed=3..5") == ("seed", range(3, 6))
    assert parse_list("guidance_scale=2,3.5") == ("guidance_scale", [2, 3.5])
    assert parse_list("number=1,2") == ("number", ["1", "2"])
    file = tmp_path / "animals.txt"
    file.write_text("\ufeffcat\n\n# not this\n  孔雀, blau \n", encoding="utf-8")
    assert parse_list(f"animal=@{file}") == ("animal", ["cat", "孔雀, blau"])


@pytest.mark.parametrize("text", ["colour", "=red", "a b=c", "x=5..4", "x=@/no/such/file", "x=@/"])
def test_bad_lists_are_told(text: str) -> None:
    with pytest.raises(InvalidParameter, match="list"):
        parse_list(text)
