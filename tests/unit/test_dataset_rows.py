"""Rows of recipes: their order, their seeds, their own columns; what filters leave."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.datasets.gates import MAX_ATTEMPTS
from farm.datasets.rows import Place, Planned, Seeds, planned
from farm.errors import InvalidConfig, RowError
from farm.prompts import MAX_PICTURES
from farm.spec import MAX_SEED
from tests.recipe_kit import recipe

Rows = list[dict[str, Any]]
MARKS = st.integers(0, 2**64 - 1)
TRIES = st.tuples(st.integers(0, MAX_PICTURES - 1), st.integers(0, MAX_ATTEMPTS - 1))


def rows(folder: Path, label: str = "", **told: Any) -> list[Planned]:
    found = list(planned(recipe(folder, **told), label))
    assert not [one for one in found if isinstance(one, RowError)], found
    return [one for one in found if isinstance(one, Planned)]


def faults(folder: Path, **told: Any) -> list[str]:
    found = planned(recipe(folder, **told))
    return [str(one) for one in found if isinstance(one, RowError)]


def jsonl(folder: Path, lines: Iterable[Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def seeds_of(some: Iterable[Planned]) -> dict[str, int]:
    return {str(one.fields["prompt"]): one.fields["seed"] for one in some}


# ---- seeds


@given(MARKS, MARKS, st.lists(TRIES, min_size=2, max_size=200, unique=True))
def test_no_two_pictures_and_no_two_attempts_at_a_prompt_share_a_seed(
    tmp_path_factory: pytest.TempPathFactory,
    prompt: int,
    combination: int,
    tries: list[tuple[int, int]],
) -> None:
    seeds = Seeds(recipe(tmp_path_factory.getbasetemp()), "")
    found = {seeds.of(Place(prompt, combination, n), attempt) for n, attempt in tries}
    assert len(found) == len(tries)
    assert min(found) >= 0
    assert max(found) <= MAX_SEED


def test_no_two_rows_share_a_seed(tmp_path: Path) -> None:
    params = {"model": "fake-fast", "steps": {"each": [4, 8]}}
    prompts = {"template": "{x} of {y}", "lists": {"x": "1..100", "y": ["a"] * 50}}
    found = [
        one.fields["seed"] for one in rows(tmp_path, prompts=prompts, params=params, pictures=2)
    ]
    assert len(set(found)) == len(found) == 20_000, "though each prompt stands fifty times"


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines.insert(0, {"prompt": "new"}),
        lambda lines: lines.pop(0),
        lambda lines: lines.reverse(),
        lambda lines: lines.insert(7, {"prompt": "p3"}),
    ],
    ids=["inserted", "removed", "moved", "again"],
)
def test_a_seed_follows_its_prompt_wherever_it_stands(tmp_path: Path, change: Any) -> None:
    lines = [{"prompt": f"p{n}", "width": 64 + 8 * (n % 2)} for n in range(20)]
    drawn = {"model": "fake-fast", "steps": {"uniform": [1, 10**9]}}
    told: Any = {"prompts": {"file": "p.jsonl"}, "params": drawn, "pictures": 2}

    def every() -> set[tuple[Any, ...]]:
        jsonl(tmp_path, lines)
        found = [one.fields for one in rows(tmp_path, **told)]
        return {(one["prompt"], one["seed"], one["steps"]) for one in found}

    before = every()
    change(lines)
    after, kept = every(), {line["prompt"] for line in lines}
    assert {one for one in before if one[0] in kept} <= after
    assert len(after) == 2 * len(lines)


def test_a_value_that_is_added_leaves_the_other_rows_seeds(tmp_path: Path) -> None:
    def every(colours: list[str], steps: list[int]) -> dict[tuple[Any, ...], int]:
        prompts = {"template": "a {c} {s}", "lists": {"c": colours, "s": ["ball", "box"]}}
        params = {"model": "fake-fast", "steps": {"each": steps}}
        found = rows(tmp_path, prompts=prompts, params=params)
        return {(one.fields["prompt"], one.fields["steps"]): one.fields["seed"] for one in found}

    few = every(["red", "blue"], [4, 8])
    assert few.items() < every(["green", "red", "blue"], [2, 4, 8]).items()


def test_rows_that_are_added_leave_the_others_seeds(tmp_path: Path) -> None:
    prompts = [{"prompt": f"p{n}"} for n in range(20)]
    jsonl(tmp_path, prompts[:15])
    file = {"file": "p.jsonl"}
    before = seeds_of(rows(tmp_path, prompts=file))
    jsonl(tmp_path, prompts)
    assert seeds_of(rows(tmp_path, prompts=file)).items() > before.items()
    few = seeds_of(rows(tmp_path, prompts=file, filters={"exclude": ["[02468]$"]}))
    assert few.items() < seeds_of(rows(tmp_path, prompts=file)).items()
    more = rows(tmp_path, prompts=file, pictures=3)
    assert len({one.fields["seed"] for one in more}) == 60
    firsts = [one for one in more if one.place.picture == 0]
    assert seeds_of(firsts) == seeds_of(rows(tmp_path, prompts=file))


def test_a_label_changes_seeds_only_of_fresh_recipes(tmp_path: Path) -> None:
    plain = {label: seeds_of(rows(tmp_path, label)) for label in ("", "a", "b")}
    assert plain[""] == plain["a"] == plain["b"]
    told: Any = {"fresh": True, "out": "{label}"}
    fresh = {label: seeds_of(rows(tmp_path, label, **told)) for label in ("a", "b")}
    assert not set(fresh["a"].values()) & set(fresh["b"].values())
    assert fresh["a"] == seeds_of(rows(tmp_path, "a", **told))


def test_explicit_seeds_count_up_with_pictures(tmp_path: Path) -> None:
    jsonl(
        tmp_path, [{"prompt": "a", "seed": 5}, {"prompt": "b", "seed": 50, "n": 3}, {"prompt": "c"}]
    )
    found = rows(tmp_path, prompts={"file": "p.jsonl"}, pictures=2)
    assert [one.fields["seed"] for one in found][:5] == [5, 6, 50, 51, 52]
    told = Seeds(recipe(tmp_path), "")
    again = {told.of(one.place, attempt) for one in found for attempt in range(1, MAX_ATTEMPTS)}
    assert len(again) == len(found) * (MAX_ATTEMPTS - 1)


# ---- combinations and draws


def test_each_row_is_combined_with_every_value_of_each(tmp_path: Path) -> None:
    params = {"model": "fake-fast", "steps": {"each": [4, 8]}, "format": {"each": ["png", "webp"]}}
    found = rows(tmp_path, params=params, pictures=2, filters={"limit": 2})
    told = [(one.fields["steps"], one.fields["format"], one.place.picture) for one in found]
    assert told == [*product([4, 8], ["png", "webp"], [0, 1])] * 2
    assert len({one.fields["seed"] for one in found}) == len(found) == 16


def test_draws_are_even_within_bounds_and_the_same_again(tmp_path: Path) -> None:
    params = {
        "model": "fake-fast",
        "steps": {"uniform": [1, 4]},
        "guidance_scale": {"uniform": [2, 3.5]},
        "scheduler": {"choice": ["euler", "ddim"]},
    }
    prompts = {"template": "p {x}", "lists": {"x": "1..4000"}}
    found = [one.fields for one in rows(tmp_path, params=params, prompts=prompts)]
    assert found == [one.fields for one in rows(tmp_path, params=params, prompts=prompts)]
    for n in (1, 2, 3, 4):
        assert 900 < sum(one["steps"] == n for one in found) < 1_100
    assert 1_880 < sum(one["scheduler"] == "euler" for one in found) < 2_120
    scales = [one["guidance_scale"] for one in found]
    assert 2 <= min(scales) < 2.01
    assert 3.49 < max(scales) <= 3.5
    assert len(set(scales)) > 1_000
    huge = {"model": "m", "steps": {"uniform": [0, 10**40]}}
    assert all(0 <= one.fields["steps"] <= 10**40 for one in rows(tmp_path, params=huge))


def test_a_rows_own_field_goes_before_what_is_drawn(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"prompt": "a", "steps": 7}, {"prompt": "b", "steps": None, "n": None}])
    params = {"model": "m", "steps": {"choice": [3]}}
    found = rows(tmp_path, prompts={"file": "p.jsonl"}, params=params)
    assert [one.fields["steps"] for one in found] == [7, 3]


# ---- sources


def test_templates_keep_what_stood_in_their_holes(tmp_path: Path) -> None:
    lists = {"x": ["ä", "b"], "n": [1, 2], "steps": [5]}
    prompts = {"template": "{x} {n}", "lists": lists}
    found = rows(tmp_path, prompts=prompts)
    assert [one.columns for one in found] == [{"x": "ä"}, {"x": "ä"}, {"x": "b"}, {"x": "b"}]
    assert [one.fields["prompt"] for one in found] == ["ä 1", "ä 2", "b 1", "b 2"]
    assert {one.fields["steps"] for one in found} == {5}


def test_templates_are_read_once_however_many_rows_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text("\n".join(map(str, range(500))))
    told = recipe(tmp_path, prompts={"template": "{x}", "lists": {"x": "@x.txt"}})
    monkeypatch.setattr("farm.datasets.recipe.parse_list", None)
    assert len(list(planned(told))) == 500


def _files(folder: Path) -> dict[str, str]:
    lines = [{"prompt": f"p{n}", "id": n, "other": "x"} for n in range(3)]
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "a.jsonl").write_text(text)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "c.csv").write_text("prompt,id,other\np0,0,x\np1,1,x\np2,2,x\n")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(lines), folder / "d.parquet")
    return {path.name: str(path) for path in sorted(folder.iterdir()) if path.suffix != ".toml"}


@pytest.mark.parametrize("columns", [{}, {"prompt": "prompt"}])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, columns: dict[str, str]) -> None:
    """What is neither a field nor kept is left out, as soon as anything is kept or named."""
    found = [
        rows(tmp_path, prompts={"file": file, "keep": {"id": "int"}, "columns": columns})
        for file in _files(tmp_path).values()
    ]
    assert [one.columns for one in found[0]] == [{"id": n} for n in range(3)]
    bare = [[one._replace(line=0) for one in some] for some in found]  # csv has a header
    assert all(some == bare[0] for some in bare)


def test_a_column_may_be_a_field_and_kept(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("caption,s\na,20\n")
    told = {
        "file": "c.csv",
        "columns": {"prompt": "caption", "steps": "s"},
        "keep": {"caption": "text", "s": "int"},
    }
    (row,) = rows(tmp_path, prompts=told)
    assert (row.fields["prompt"], row.fields["steps"]) == ("a", 20)
    assert row.columns == {"caption": "a", "s": 20}


@pytest.mark.parametrize(
    ("kind", "given", "got"),
    [
        ("text", "ä", "ä"), ("text", 1, "1"), ("text", 1.5, "1.5"), ("text", True, "True"),
        ("text", None, None), ("int", 2**63 - 1, 2**63 - 1), ("int", " 7 ", 7), ("int", "", None),
        ("float", 3, 3.0), ("float", "1e3", 1000.0), ("float", 10**400, float("inf")),
        ("bool", "TRUE", True), ("bool", 0, False), ("bool", False, False),
    ],
)  # fmt: skip
def test_columns_have_their_kind(tmp_path: Path, kind: str, given: Any, got: Any) -> None:
    jsonl(tmp_path, [{"prompt": "a", "x": given}])
    (row,) = rows(tmp_path, prompts={"file": "p.jsonl", "keep": {"x": kind}})
    assert row.columns["x"] == got
    assert type(row.columns["x"]) is type(got)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("text", [1]), ("text", {"a": 1}), ("int", 1.5), ("int", "x"), ("int", 2**63), ("int", [1]),
        ("int", True), ("float", "x"), ("float", {}), ("bool", 2), ("bool", "yes"),
    ],
)  # fmt: skip
def test_columns_of_another_kind_are_told_by_line(tmp_path: Path, kind: str, given: Any) -> None:
    jsonl(tmp_path, [{"prompt": "a", "x": None}, {"prompt": "a", "x": given}])
    (told,) = faults(tmp_path, prompts={"file": "p.jsonl", "keep": {"x": kind}})
    assert told.startswith("line 2: x: ")


def test_faults_of_files_are_told_by_line(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"prompt": "a", "n": 0}, {"prompt": "b"}, [1], {"prompt": "c", "n": True}])
    told = faults(tmp_path, prompts={"file": "p.jsonl"})
    assert [one.partition(":")[0] for one in told] == ["line 1", "line 3", "line 4"]
    huge = {"template": "{x}", "lists": {"x": [10**30]}}
    assert "a whole number of 64 bits" in faults(tmp_path, prompts=huge)[0]
    with pytest.raises(InvalidConfig, match="No such file"):
        list(planned(recipe(tmp_path, prompts={"file": "none.jsonl"})))


# ---- filters


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({}, ["aa", "b", "aa", "ccc", "B"]),
        ({"distinct": True}, ["aa", "b", "ccc", "B"]),
        ({"exclude": ["(?i)^b$", "c{3}"]}, ["aa", "aa"]),
        ({"min_chars": 2}, ["aa", "aa", "ccc"]),
        ({"max_chars": 2}, ["aa", "b", "aa", "B"]),
        ({"limit": 2}, ["aa", "b"]),
        ({"limit": 2, "distinct": True, "min_chars": 2}, ["aa", "ccc"]),
        ({"min_chars": 9}, []),
    ],
)
def test_filters(tmp_path: Path, filters: dict[str, Any], left: list[str]) -> None:
    jsonl(tmp_path, [{"prompt": one} for one in ("aa", "b", "aa", "ccc", "B")])
    found = rows(tmp_path, prompts={"file": "p.jsonl"}, filters=filters)
    assert [one.fields["prompt"] for one in found] == left


def test_halves_of_characters_are_filtered_like_all_others(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\ud800"}\n' * 2)
    assert len(rows(tmp_path, prompts={"file": "p.jsonl"}, filters={"distinct": True})) == 1
