"""Recipes: what is refused and in which words, and what decides a run's batch."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from farm.datasets.recipe import Recipe, check_label, load_recipe
from farm.errors import InvalidConfig, InvalidParameter
from tests.recipe_kit import COLOURS, recipe, write_recipe

EXAMPLE = Path(__file__).parents[2] / "farm" / "datasets" / "example.toml"
SECRET = "https://hooks.example.org/s3cr3t"


def written(folder: Path, text: str) -> Path:
    """A plain recipe with `text` behind it."""
    path = write_recipe(folder)
    path.write_text(path.read_text() + text)
    return path


def one_list(values: Any, **more: Any) -> dict[str, Any]:
    return {"template": "a {x}", "lists": {"x": values}, **more}


def test_the_example_is_a_recipe() -> None:
    told = load_recipe(EXAMPLE)
    assert (told.name, told.shared, told.columns) == (
        "shapes",
        {"model": "shapes"},
        {"colour": str, "shape": str},
    )


OF_FILES = ("file", "format", "columns", "keep")
OF_TEMPLATES = (
    "template",
    "negative_prompt",
    "pick",
    "count",
    "colour",
    "shape",
    "[prompts.lists]",
)


@pytest.mark.parametrize("of_others", [OF_FILES, OF_TEMPLATES])
def test_all_that_the_example_offers_is_good(of_others: tuple[str, ...], tmp_path: Path) -> None:
    text = re.sub(r"^# (\w+ = |\[)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(of_others)]
    text = "\n".join(lines).replace('out = "datasets/', 'out = "datasets/{label}/')
    (tmp_path / "all.toml").write_text(text)
    told = load_recipe(tmp_path / "all.toml")
    assert (told.fresh, told.filters.distinct, told.gates.attempts) == (True, True, 3)
    assert (told.prompts.file is None) == (of_others == OF_FILES)
    assert told.notify
    assert told.gates.scores[0].plugin == "workers.scores:ClipScore"
    assert (told.combinations, set(told.drawn)) == (2, {"guidance_scale", "scheduler"})


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"name": "A b"}, "name: expected small letters"),
        ({"out": ""}, "out: "),
        ({"out": "https://example.org/x"}, "out: expected a directory, or s3://bucket/prefix"),
        ({"out": "file:///srv/x"}, "out: expected a directory"),
        ({"out": "a\u0000b"}, "out: holds a NUL"),
        ({"fresh": True}, "out: with fresh = true it needs {label}"),
        ({"priority": 1_000_001}, "priority: "),
        ({"out": "~nobody-of-that-name/x"}, "out: "),
        ({"typo": 1}, "typo: no such key"),
        ({"sampled": {}}, "sampled: no such key"),
        ({"seed": 2**63}, "seed: "),
        ({"pictures": 0}, "pictures: "),
        ({"shard_size": 0}, "shard_size: "),
        ({"formats": []}, "formats: "),
        ({"formats": ["zip"]}, "formats: 'zip' is none of webdataset, parquet, imagefolder"),
        ({"formats": ["parquet", "parquet"]}, "formats: one stands twice"),
        ({"params": {}}, "params: model is missing"),
        ({"params": {"model": "m", "n": 2}}, "params: 'n' is none of"),
        ({"params": {"model": "m", "seed": 2}}, "params: 'seed' is none of"),
        ({"params": {"model": "m", "steps": {"each": []}}}, "params.steps.each: "),
        ({"params": {"model": "m", "steps": {"each": [[1]]}}}, "expected a text, a number"),
        ({"params": {"model": "m", "steps": {"one": [1]}}}, "params.steps.one: no such key"),
        ({"params": {"model": "m", "steps": {"uniform": [9, 1]}}}, "must not be larger"),
        ({"params": {"model": "m", "steps": {"uniform": [False, True]}}}, "expected a number"),
        ({"params": {"model": "m", "steps": {"uniform": ["1", "2"]}}}, "expected a number"),
        (
            {"params": {"model": "m", "steps": {"each": [1], "choice": [1]}}},
            "params.steps: give one of each, choice or uniform",
        ),
        (
            {"params": {"model": "m"} | {n: {"each": [*range(40)]} for n in ("width", "height")}},
            "1,600 combinations of `each`",
        ),
        ({"filters": {"exclude": ["("]}}, "filters.exclude.0: no regular expression"),
        ({"filters": {"exclude": ["(" * 5_000 + ")" * 5_000]}}, "no regular expression"),
        ({"filters": {"exclude": ["a{99999999999999999999}"]}}, "no regular expression"),
        ({"prompts": {}}, "prompts: give file or template"),
        ({"prompts": {"file": "a.jsonl", "template": "b"}}, "give file or template, and not both"),
        ({"prompts": {"file": "a.jsonl", "count": 3}}, "go with template"),
        ({"prompts": {"file": "a.doc"}}, "say format"),
        ({"prompts": {"file": "a.jsonl", "keep": ["prompt"]}}, "readers take this name"),
        ({"prompts": {"file": "a.jsonl", "keep": [["id"]]}}, "prompts.keep: "),
        ({"prompts": {"file": "a.jsonl", "keep": {"id": "blob"}}}, "prompts.keep.id: "),
        ({"prompts": {"file": "a.jsonl", "columns": {"x": "y"}}}, "columns: 'x' is none of"),
        ({"prompts": {"template": "a {label}"}}, "template: no list for {label}"),
        ({"prompts": {"template": "a {x.y}"}}, "is no plain name"),
        ({"prompts": one_list([])}, "list 'x': there is nothing in it"),
        ({"prompts": one_list([["a"]])}, "list 'x': expected"),
        ({"prompts": one_list("1..1000000000000")}, "1,000,000,000,000 rows"),
        ({"prompts": one_list("1..9999999999999999999")}, "is too long"),
        ({"prompts": one_list("@nothing.txt")}, "is no file"),
        ({"prompts": {"template": "{row}", "lists": {"row": ["a"]}}}, "readers take this name"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(tmp_path: Path, told: dict[str, Any], words: str) -> None:
    path = write_recipe(tmp_path, **told)
    with pytest.raises(InvalidConfig) as caught:
        load_recipe(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps", "test.toml: "),
        ("x = " + "[" * 3_000, "test.toml: "),
        ("folder = 1", "folder: no such key"),
        ("[gates]\nblank = 1979-05-27\n", "gates.blank: "),
    ],
)
def test_what_is_no_toml_or_holds_dates_is_said(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        load_recipe(written(tmp_path, text))
    with pytest.raises(InvalidConfig, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(InvalidConfig, match="directory"):
        load_recipe(tmp_path)


def test_numbers_without_end_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    for given in ("nan", "inf", "-inf"):
        text = path.read_text().replace(
            '"model" = "fake-fast"', f'model = "m", guidance_scale = {{uniform = [{given}, 1]}}'
        )
        (tmp_path / "odd.toml").write_text(text)
        with pytest.raises(InvalidConfig, match=r"params\.guidance_scale\.uniform\.0"):
            load_recipe(tmp_path / "odd.toml")


@pytest.mark.parametrize("label", ["2026-12-01", "2026-11-25t0200-2", "a", "v1.0", "x" * 63])
def test_labels(tmp_path: Path, label: str) -> None:
    assert check_label(label) == label
    told = recipe(tmp_path, out="sets/{label}/x")
    assert told.place(label) == str(tmp_path / "sets" / label / "x")
    assert recipe(tmp_path, out="s3://sets/{label}").place(label) == f"s3://sets/{label}"


@pytest.mark.parametrize(
    "label",
    ["..", ".", "../x", "a/b", "/etc", "a\n", "A", "a b", "-x", "a.", "x" * 64, "a\0", "ä", "~"],
)
def test_labels_that_no_path_may_hold(tmp_path: Path, label: str) -> None:
    told = recipe(tmp_path, out="sets/{label}")
    with pytest.raises(InvalidParameter, match="label"):
        told.place(label)
    with pytest.raises(InvalidParameter, match="label"):
        recipe(tmp_path, out="sets").place(label)


def test_a_place_for_labels_wants_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="--label"):
        recipe(tmp_path, out="sets/{label}").place("")


def test_places_are_from_the_recipes_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert recipe(tmp_path / "r", out="../sets").place("") == str(tmp_path / "r" / ".." / "sets")
    assert recipe(tmp_path / "r", out="/srv/sets").place("") == "/srv/sets"
    assert recipe(tmp_path / "r", out="~/sets").place("") == str(tmp_path / "home" / "sets")
    params = {"model": "m", "init_image": "cat.png", "mask_image": "blob:inputs/x.png"}
    shared = recipe(tmp_path / "r", params=params).shared
    assert shared["init_image"] == str(tmp_path / "r" / "cat.png")
    assert shared["mask_image"] == "blob:inputs/x.png"


@pytest.mark.parametrize(
    "text",
    [
        f'[notify]\nwebhook = "{SECRET}"\n# webhook = "{SECRET}"\n',
        f'["\\u006eotify"]\nwebhook = "{SECRET}"\n',
        f'# [notify]\n# webhook = "{SECRET}"\n',
        f'[[gates.scores]]\nname = "x"\nplugin = "a:b"\nmin = 1\n[notify]\nwebhook = "{SECRET}"\n',
        f'notify.webhook = "{SECRET}"\n',
    ],
)
def test_what_is_published_holds_no_webhook(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    told = tomllib.loads(path.read_text())
    told.pop("notify", None)
    public = load_recipe(path).public_text
    assert SECRET not in public
    assert tomllib.loads(public) == told


def test_a_wrong_webhook_is_not_repeated(tmp_path: Path) -> None:
    path = written(tmp_path, f'[notify]\nwebhook = "{SECRET.replace("https", "ftp")}"\n')
    with pytest.raises(InvalidConfig, match=r"notify\.webhook") as caught:
        load_recipe(path)
    assert "s3cr3t" not in caught.value.message


def digest(folder: Path, label: str = "", **told: Any) -> str:
    return recipe(folder, **told).digest(label)


def test_the_digest_knows_what_decides_the_rows(tmp_path: Path) -> None:
    plain = digest(tmp_path)
    same: list[dict[str, Any]] = [
        {"out": "elsewhere"},
        {"shard_size": 3},
        {"formats": ["parquet"]},
        {"gates": {"blank": False, "attempts": 3}},
        {"card": {"licence": "mit", "title": "T"}},
        {"priority": 5},
    ]
    assert {digest(tmp_path, **told) for told in same} == {plain}
    other: list[dict[str, Any]] = [
        {"seed": 1},
        {"pictures": 2},
        {"fresh": True, "out": "{label}"},
        {"name": "other"},
        {"params": {"model": "fake-fast", "steps": 2}},
        {"params": {"model": "fake-fast", "steps": {"each": [2]}}},
        {"params": {"model": "fake-fast", "steps": {"choice": [2]}}},
        {"filters": {"limit": 3}},
        {"prompts": one_list(["a"])},
        {"prompts": one_list(["b"])},
        {"prompts": one_list("1..3")},
        {"prompts": one_list("1..4")},
    ]
    found = [digest(tmp_path, **told) for told in other] + [digest(tmp_path, "label"), plain]
    assert len(set(found)) == len(found)
    assert recipe(tmp_path).digest("", {"fake-fast": {"steps": 1}}) != plain


def test_the_digest_reads_the_files_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "x.txt").write_text("a\n")
    file, listed = {"file": "p.jsonl"}, one_list("@x.txt")
    before = digest(tmp_path, prompts=file), digest(tmp_path, prompts=listed)
    assert before == (digest(tmp_path, prompts=file), digest(tmp_path, prompts=listed))
    (tmp_path / "p.jsonl").write_text('{"prompt": "b"}\n')
    (tmp_path / "x.txt").write_text("b\n")
    after = digest(tmp_path, prompts=file), digest(tmp_path, prompts=listed)
    assert not set(before) & set(after)
    with pytest.raises(InvalidConfig, match="no plain file"):
        digest(tmp_path, prompts={"file": "/dev/zero", "format": "txt"})


@pytest.mark.parametrize("given", ["i.png", {"each": ["j.png", "i.png"]}, {"choice": ["i.png"]}])
def test_the_digest_reads_the_pictures_that_rows_begin_with(tmp_path: Path, given: Any) -> None:
    params = {"model": "fake-fast", "init_image": given}
    (tmp_path / "i.png").write_bytes(b"1")
    (tmp_path / "j.png").write_bytes(b"1")
    before = digest(tmp_path, params=params)
    (tmp_path / "i.png").write_bytes(b"2")
    assert digest(tmp_path, params=params) != before
    (tmp_path / "i.png").unlink()
    with pytest.raises(InvalidConfig, match=r"i\.png: No such file"):
        digest(tmp_path, params=params)
    digest(tmp_path, params=params | {"init_image": "blob:inputs/x.png"})


def test_what_is_published_holds_no_options_of_scores(tmp_path: Path) -> None:
    score = '[[gates.scores]]\nname = "x"\nplugin = "a:b"\noptions = { api_key = "sk-1" }\n'
    told = load_recipe(written(tmp_path, score))
    assert told.gates.scores[0].options == {"api_key": "sk-1"}
    assert "sk-1" not in told.public_text
    assert "a:b" in told.public_text


@pytest.mark.parametrize(
    ("given", "got", "ours"),
    [
        (5, "5", True),
        (5, "5000", False),
        (5, "5: too few", True),
        ("x" * 90, repr("x" * 90)[:57] + "... (92 characters)", True),
        ({"choice": [5, 6]}, "6", True),
        ({"uniform": [1, 10]}, "7", True),
        ({"uniform": [1, 10]}, "5000", False),
        ({"uniform": [1, 10]}, "'a'", False),
    ],
)
def test_whose_a_wrong_value_is(tmp_path: Path, given: Any, got: str, ours: bool) -> None:
    told = recipe(tmp_path, params={"model": "m", "scheduler": given})
    assert told.gives("scheduler", got) is ours
    assert not told.gives("steps", got)


def test_a_long_range_costs_nothing(tmp_path: Path) -> None:
    told = recipe(tmp_path, prompts=one_list("1..9000000000000", pick="sample", count=3))
    assert told.columns == {"x": int}
    assert len(told.digest("")) == 64


def test_lists_give_columns_of_their_kind(tmp_path: Path) -> None:
    lists = {
        "s": ["a"], "i": [1, 2], "f": [1, 2.5], "b": [True], "mixed": [1, "a"], "odd": [True, 2],
        "range": "1..3", "steps": [1],
    }  # fmt: skip
    template = " ".join(f"{{{name}}}" for name in lists if name != "steps")
    told = recipe(tmp_path, prompts={"template": template, "lists": lists})
    assert told.columns == {
        "s": str, "i": int, "f": float, "b": bool, "mixed": str, "odd": str, "range": int,
    }  # fmt: skip


def test_a_recipe_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(COLOURS))
    told: Recipe = recipe(tmp_path, prompts=one_list("@x.txt"))
    (tmp_path / "x.txt").unlink()
    assert told.template
    assert list(told.template.lists["x"]) == list(COLOURS)
    assert json.loads(told.model_dump_json())["name"] == "test"
