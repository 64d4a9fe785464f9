from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from farm.catalog import LORA, NOTE, Lane, ModelEntry, Weights, load_catalog
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
    assert set(entry.refusals(asked(height=5000, scheduler="ddim"))) == {"height", "scheduler"}


def asked(**given: Any) -> dict[str, Any]:
    plain = {"width": 64, "height": 64, "steps": 30, "guidance_scale": 5.0, "scheduler": None}
    return plain | given


LIMITED = """
[models.turbo]
licence = "other"
licence_url = "https://example.org/licence"
terms = "no commercial use"
family = "sd-turbo"
memory_gb = 2.5
defaults = { width = 512, height = 512, steps = 1, guidance_scale = 0.0 }
sizes = ["512x512", "768x512"]
max_steps = 4
max_guidance = 1.0
[models.turbo.engines.diffusers]
repo = "me/turbo"
dtype = { default = "float16", vae = "float32" }
[models.turbo.engines.sdcpp]
url = "https://example.org/files/turbo%20q8.gguf?x=1"
sha256 = "SHA"
""".replace("SHA", "a" * 64)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"width": 768, "height": 512, "steps": 4, "guidance_scale": 1.0}, set()),
        ({"width": 512, "height": 768, "steps": 4, "guidance_scale": 1.0}, {"width"}),
        ({"width": 512, "height": 512, "steps": 5, "guidance_scale": 1.0}, {"steps"}),
        ({"width": 512, "height": 512, "steps": 4, "guidance_scale": 1.5}, {"guidance_scale"}),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    tmp_path: Path, given: dict[str, Any], named: set[str]
) -> None:
    (tmp_path / "models.toml").write_text(LIMITED)
    entry = load_catalog(tmp_path / "models.toml").get("turbo")
    assert set(entry.refusals(asked(**given))) == named


def test_an_entry_tells_family_need_terms_and_dtypes(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(LIMITED)
    entry = load_catalog(tmp_path / "models.toml").get("turbo")
    assert (entry.family, entry.memory_gb, entry.terms) == ("sd-turbo", 2.5, "no commercial use")
    assert entry.engines["diffusers"].dtype == {"default": "float16", "vae": "float32"}
    assert entry.engines["sdcpp"].file_name == "turbo q8.gguf"


def test_fetched_weights_come_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(LIMITED)
    for engine, files in (("diffusers", ["a", "b"]), ("sdcpp", ["turbo q8.gguf"])):
        place = tmp_path / "weights" / "turbo" / engine
        place.mkdir(parents=True)
        source = load_catalog(tmp_path / "models.toml").weights(Lane("turbo", engine)).source
        (place / NOTE).write_text(json.dumps({"source": source, "files": files}))
    catalog = load_catalog(tmp_path / "models.toml", tmp_path / "weights")
    place = tmp_path / "weights" / "turbo"
    found = catalog.weights(Lane("turbo", "diffusers"))
    assert (found.path, found.repo) == (place / "diffusers", None)
    assert Weights.model_validate(found.model_dump()) == found
    assert catalog.weights(Lane("turbo", "sdcpp")).path == place / "sdcpp" / "turbo q8.gguf"

    text = LIMITED.replace('"me/turbo"', '"me/turbo"\nrevision = "v2"')
    (tmp_path / "models.toml").write_text(text)  # other weights than those that were fetched
    catalog = load_catalog(tmp_path / "models.toml", tmp_path / "weights")
    assert catalog.weights(Lane("turbo", "diffusers")).path is None


LORA_ENTRY = """
[loras.pixel-art]
licence = "mit"
terms = "name its maker"
models = ["sdxl-base", "shapes"]
weights = { path = "pixel-art.safetensors" }
"""


def test_a_lora_stands_beside_the_models(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(GOOD + LORA_ENTRY)
    catalog = load_catalog(tmp_path / "models.toml")
    assert (
        list(catalog.loras_for("shapes")) == list(catalog.loras_for("sdxl-base")) == ["pixel-art"]
    )
    assert catalog.entry("pixel-art").terms == "name its maker"
    assert catalog.entry("sdxl-base") is catalog.get("sdxl-base")
    assert catalog.weights(Lane("pixel-art", LORA)).path == tmp_path / "pixel-art.safetensors"
    assert Lane("pixel-art", LORA) not in catalog.lanes()
    with pytest.raises(UnknownModel):
        catalog.get("pixel-art")
    with pytest.raises(UnknownModel, match=r"no model or LoRA .*did you mean pixel-art\?"):
        catalog.entry("pixle-art")


def test_a_fetched_lora_comes_as_its_one_file(tmp_path: Path) -> None:
    text = LORA_ENTRY.replace('path = "pixel-art.safetensors"', 'repo = "me/pixel"')
    (tmp_path / "models.toml").write_text(GOOD + text)
    place = tmp_path / "weights" / "pixel-art" / LORA
    place.mkdir(parents=True)
    source = {"repo": "me/pixel"}
    (place / NOTE).write_text(json.dumps({"source": source, "files": ["pixel.safetensors"]}))
    catalog = load_catalog(tmp_path / "models.toml", tmp_path / "weights")
    assert catalog.weights(Lane("pixel-art", LORA)).path == place / "pixel.safetensors"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("loras.pixel-art", "loras.sdxl-base", r"loras.sdxl-base: a model has this name"),
        ("loras.pixel-art", "loras.shapes", r"loras.shapes: a model has this name"),
        ('"shapes"]', '"shapse"]', r"loras.pixel-art.models: no model shapse"),
        ('["sdxl-base", "shapes"]', "[]", r"loras.pixel-art.models"),
        ('"pixel-art.safetensors"', '"pixel.ckpt"', r"pixel-art.weights: .*pickled"),
        ('"pixel-art.safetensors"', '"pixel.pt", allow_pickle = true', r"has no allow_pickle"),
        ('"pixel-art.safetensors"', '"pixel"', r"one .safetensors file, not pixel"),
        ('"pixel-art.safetensors"', '"p.safetensors", dtype = "float16"', r"has no dtype"),
        ('path = "pixel-art.safetensors"', "", r"loras.pixel-art: .*give path, repo or url"),
        ('licence = "mit"', "", r"loras.pixel-art.licence"),
        ("loras.pixel-art", "loras.'../x'", r"pattern"),
    ],
)
def test_a_wrong_lora_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    assert old in LORA_ENTRY
    (tmp_path / "models.toml").write_text(GOOD + LORA_ENTRY.replace(old, new))
    with pytest.raises(InvalidConfig, match=rf"models\.toml: .*{named}"):
        load_catalog(tmp_path / "models.toml")


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"source": 1, "files": []}', "\xff"])
def test_a_broken_note_is_no_copy(tmp_path: Path, note: str) -> None:
    (tmp_path / "models.toml").write_text(LIMITED)
    place = tmp_path / "weights" / "turbo" / "diffusers"
    place.mkdir(parents=True)
    (place / NOTE).write_text(note)
    catalog = load_catalog(tmp_path / "models.toml", tmp_path / "weights")
    assert catalog.weights(Lane("turbo", "diffusers")).path is None


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
        (GOOD.replace("schedulers", "sizes = ['512x512']\nschedulers"), r"defaults.width: 1024"),
        (GOOD.replace("schedulers", "max_steps = 8\nschedulers"), r"defaults.steps: 25 is not at"),
        (GOOD.replace("schedulers", "min_guidance = 9\nmax_guidance = 8\nschedulers"), r"is above"),
        (GOOD.replace("schedulers", "family = 'sd9'\nschedulers"), r"sdxl-base.family"),
        (GOOD.replace("schedulers", "memory_gb = -1\nschedulers"), r"sdxl-base.memory_gb"),
        (GOOD.replace('"weights/sdxl"', "'x.ckpt'"), r"diffusers: .*allow_pickle"),
        (GOOD.replace('path = "weights/sdxl"', "url = 'https://h/x.gguf'"), r"needs the sha256"),
        (GOOD.replace('path = "weights/sdxl"', "url = 'file:///etc/passwd'"), r"diffusers.url"),
        (GOOD.replace('path = "weights/sdxl"', "repo = '../x'"), r"diffusers.repo"),
        (GOOD.replace('"float16"', "{ vae = 'int3' }"), r"diffusers.dtype"),
        (GOOD.replace('"float16"', "{ '../x' = 'float16' }"), r"names no component"),
        (GOOD + "files = ['*.json']", r"files goes with repo only"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=named):
        load_catalog(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"gone\.toml: No such file or directory$"):
        load_catalog(tmp_path / "gone.toml")


def test_allowed_schedulers_have_their_common_names() -> None:
    told = {"licence": "mit", "engines": {"diffusers": {"path": "x"}}}
    entry = ModelEntry.model_validate(
        told | {"schedulers": ["DDIMScheduler"], "defaults": {"scheduler": "DDIMScheduler"}}
    )
    assert entry.schedulers == ("ddim",)
    assert entry.defaults.scheduler == "ddim"
    assert not entry.refusals({**asked(), "scheduler": "ddim"})
    with pytest.raises(ValueError, match="scheduler: ddim is not one of euler"):
        ModelEntry.model_validate(
            told | {"schedulers": ["euler"], "defaults": {"scheduler": "DDIMScheduler"}}
        )
