from __future__ import annotations

from pathlib import Path

import pytest

from farm.catalog import Lane, load_catalog
from farm.errors import InvalidConfig, UnknownModel

GOOD = """
[models.sdxl-base]
licence = "openrail++"
defaults = { width = 1024, height = 1024 }
schedulers = ["euler", "euler_a"]
[models.sdxl-base.engines.diffusers]
path = "weights/sdxl"
dtype = "float16"
"""


def test_the_demo_model_is_built_in() -> None:
    catalog = load_catalog()
    entry = catalog.get("shapes")
    assert entry.licence == "apache-2.0"
    assert catalog.lanes() == [Lane("shapes", "diffusers")]
    assert Lane("shapes", "diffusers").queue == "render.shapes.diffusers"


def test_a_models_file_adds_and_paths_are_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(GOOD)
    catalog = load_catalog(path)
    assert set(catalog.models) == {"shapes", "sdxl-base"}
    weights = catalog.weights(Lane("sdxl-base", "diffusers"))
    assert weights.path == tmp_path / "weights" / "sdxl"
    entry = catalog.get("sdxl-base")
    asked = {"width": 64, "height": 5000, "steps": 30, "scheduler": "ddim"}
    assert set(entry.refusals(asked)) == {"height", "scheduler"}


def test_unknown_names_say_what_there_is(tmp_path: Path) -> None:
    catalog = load_catalog()
    with pytest.raises(UnknownModel, match=r"shapes.*did you mean shapes"):
        catalog.get("shaps")
    with pytest.raises(UnknownModel, match="only for: diffusers"):
        catalog.weights(Lane("shapes", "sdcpp"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[models.x]\nlicence='a'", r"models.x.engines"),
        ("[models.x.engines.diffusers]\npath='a'", r"models.x.licence"),
        ("[models.x]\nlicence='a'\n[models.x.engines.magic]\npath='a'", r"magic"),
        ("[models.x]\nlicence='a'\n[models.x.engines.diffusers]\npath='a'\nrepo='b'", r"not both"),
        ("[models.'../x']\nlicence='a'\n[models.'../x'.engines.diffusers]\npath='a'", r"pattern"),
        ("[models.x]\nlicense='a'", r"license"),
        ("nonsense", r"models.toml"),
        (GOOD.replace("euler_a", "magic"), r"unknown scheduler"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=named):
        load_catalog(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"gone\.toml"):
        load_catalog(tmp_path / "gone.toml")
