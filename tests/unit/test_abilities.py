from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from farm.catalog import Catalog, LoraEntry, ModelEntry, Weights
from farm.errors import InvalidParameter, InvalidPrompt, RowError
from farm.prompts import Defaults, make_jobs, prompt_rows
from farm.spec import JobSpec, NewJob

PICTURE = f"inputs/{'a' * 64}.png"
CATALOG = Catalog(
    {
        "both": ModelEntry(
            licence="mit", family="sd1", engines={"diffusers": Weights(), "sdcpp": Weights()}
        ),
        "flux": ModelEntry(licence="mit", family="flux", engines={"diffusers": Weights()}),
    },
    {
        "pixel": LoraEntry(
            licence="mit", models=("both",), weights=Weights(path=Path("pixel.safetensors"))
        )
    },
)


def one(**row: Any) -> JobSpec | RowError:
    (found,) = make_jobs(
        prompt_rows([{"prompt": "a", **row}]), Defaults({"model": "both"}, take=take), CATALOG
    )
    return found.spec if isinstance(found, NewJob) else found


def take(given: str) -> str:
    if given == "missing.png":
        raise InvalidParameter("no such file")
    return PICTURE


def wrong(**row: Any) -> RowError:
    found = one(**row)
    assert isinstance(found, RowError)
    return found


def right(**row: Any) -> JobSpec:
    found = one(**row)
    assert isinstance(found, JobSpec)
    return found


def test_what_only_one_engine_can_do_goes_to_that_one() -> None:
    assert right().engine is None
    assert right(scheduler="euler").engine is None
    assert right(scheduler="unipc").engine == "diffusers"
    assert right(engine="sdcpp").engine == "sdcpp"


LONG = "é" * 2_001  # 4,002 bytes as UTF-8


@pytest.mark.parametrize("text", [LONG, "a cat <LoRA:../x:1>"])
def test_a_text_that_one_engine_does_not_take_goes_to_the_other(text: str) -> None:
    assert right(prompt=text).engine == right(negative_prompt=text).engine == "diffusers"
    rows = [{"prompt": "a"}, {"prompt": text}, {"prompt": "b"}, {"prompt": text}, {"prompt": "c"}]
    for given in (rows, rows[1:]):  # whatever shape came first
        jobs = make_jobs(prompt_rows(given), Defaults({"model": "both"}), CATALOG)
        engines = [job.spec.engine for job in jobs if isinstance(job, NewJob)]
        assert engines == ["diffusers" if row["prompt"] == text else None for row in given]
    fault = wrong(prompt=text, engine="sdcpp")
    assert (fault.field, fault.code) == ("prompt", InvalidPrompt.code)
    assert "engine sdcpp" in fault.expected


def test_a_fault_shows_the_value_of_its_field() -> None:
    assert wrong(strength=0.5).got == "0.5: strength and init_image go together"
    assert wrong(loras={"nosuch": 0.5}).got == "{'nosuch': 0.5}"


def test_what_no_engine_asked_for_can_do_is_refused() -> None:
    assert "on engine sdcpp" in wrong(engine="sdcpp", scheduler="unipc").expected
    assert wrong(engine="fake").expected == "one of diffusers, sdcpp, or nothing for any"
    assert wrong(model="flux", engine="sdcpp").field == "engine"
    assert "family flux" in wrong(model="flux", clip_skip=2).expected


def test_loras_are_those_of_the_catalogue_that_fit_the_model() -> None:
    assert right(loras={"pixel": 0.7}).loras == (("pixel", 0.7),)
    assert "pixel" in wrong(loras={"pixl": 0.7}).expected
    assert "none" in wrong(model="flux", loras="pixel").expected


def test_input_pictures_become_keys_with_a_default_strength() -> None:
    spec = right(init_image="cat.png", mask_image="mask.png")
    assert (spec.init_image, spec.mask_image, spec.strength) == (PICTURE, PICTURE, 0.8)
    assert right(init_image="cat.png", strength=0.25).strength == 0.25
    assert "no such file" in wrong(init_image="missing.png").got


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"mask_image": "mask.png"}, "mask_image"),
        ({"strength": 0.5}, "strength"),
        ({"init_image": "cat.png", "strength": 1.5}, "strength"),
        ({"init_image": 3}, "init_image"),
    ],
)
def test_pictures_that_do_not_go_together_are_refused(row: dict[str, Any], field: str) -> None:
    assert wrong(**row).field == field
