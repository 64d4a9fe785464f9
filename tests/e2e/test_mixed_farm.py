"""Two kinds of workers side by side: diffusers with the demo model, sdcpp with a tiny one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from farm.engines import missing_packages
from tests import sdcpp_models
from tests.farm_kit import FarmKit, engine_child, until

if missing_packages("sdcpp"):
    pytest.skip("stable-diffusion.cpp is not installed", allow_module_level=True)

ENGINES = {"shapes": "diffusers", "klein": "sdcpp"}
PROMPTS = {
    "English": "a red circle on a white background",
    "Spanish": "un círculo rojo, ¿y un niño pequeño?",
    "Chinese": "白色背景上的红色圆圈，《画》",
    "Japanese": "白い背景に赤い円。ガギグ",
    "Korean": "흰 배경에 빨간 원",
    "Arabic": "دائرة حمراء على خلفية بيضاء",
    "emoji": '👩‍🚀 a 🔴 on ⬜️, 🏳️‍🌈 (1:1) "quoted" \\ <b>',
}
KLEIN = """
[models.klein]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 2, guidance_scale = 1.0 }}
[models.klein.engines.sdcpp]
path = "{path}"
threads = 1
"""


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[FarmKit]:
    models = KLEIN.format(path=sdcpp_models.klein())
    with FarmKit(tmp_path / "home", redis_url, models=models) as kit:
        kit.dispatcher()
        yield kit


def test_each_job_ends_on_its_engine_and_every_prompt_comes_back(kit: FarmKit) -> None:
    for model, engine in ENGINES.items():
        kit.worker(model, engine)
    rows = [
        {"prompt": prompt, "model": model, "seed": seed}
        for prompt in PROMPTS.values()
        for model in ENGINES
        for seed in (1, 2)
    ]
    batch = kit.farm.submit(rows, name="mixed")
    status = kit.farm.wait(batch.id, 120)
    assert status.counts["succeeded"] == len(rows), kit.log("worker-klein")
    digests = {w.model: w.info["weights_sha256"][:10] for w in kit.farm.workers()}
    pictures = list(kit.farm.pictures(batch.id))
    assert len(pictures) == len(rows)
    for job in pictures:
        model, prompt = job.spec["model"], job.spec["prompt"]
        assert job.engine == ENGINES[model]
        assert prompt == rows[job.idx]["prompt"]
        text = Image.open(io.BytesIO(kit.farm.fetch(job))).info["parameters"]
        assert text.startswith(prompt + "\n")
        assert f"Model hash: {digests[model]}" in text
    assert len({job.sha256 for job in pictures}) == len(rows)
    kit.assert_whole(batch.id)


def test_a_cancelled_render_of_native_code_gives_way_to_the_next(kit: FarmKit) -> None:
    worker = kit.worker("klein", "sdcpp")
    before = engine_child(worker).pid
    endless = kit.farm.submit([{"prompt": "a cat", "model": "klein", "steps": 500, "width": 512,
                                "height": 512}])  # fmt: skip
    until(lambda: kit.farm.status(endless.id).counts["running"] == 1, 30)
    kit.farm.cancel(endless.id)
    after = kit.farm.submit([{"prompt": "a dog", "model": "klein"}])
    assert kit.farm.wait(endless.id, 30).counts["cancelled"] == 1
    assert kit.farm.wait(after.id, 30).counts["succeeded"] == 1
    assert engine_child(worker).pid != before
    assert kit.farm.status(after.id).counts["failed"] == 0
