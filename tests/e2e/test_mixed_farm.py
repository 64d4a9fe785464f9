"""Two kinds of workers pull one rope under `farm up`: diffusers and stable-diffusion.cpp."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
from PIL import Image

from farm.config import load_settings
from farm.demo import SHAPES_DIR
from farm.engines import missing_packages
from farm.service import Farm
from farm.store.reads import Job
from farm.store.sessions import Worker
from tests import sdcpp_models
from tests.farm_kit import FarmKit, engine_child, until
from tests.up_kit import Up

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
MODELS = """
[models.klein]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 2, guidance_scale = 1.0 }}
[models.klein.engines.sdcpp]
path = "{klein}"

[models.duo]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 6, guidance_scale = 1.0 }}
[models.duo.engines.diffusers]
path = "{shapes}"
dtype = "float32"
[models.duo.engines.sdcpp]
path = "{klein}"
"""
PICTURES = 240
WITHIN = 2.5
"""How far the split may be from the speeds, as a factor: a bundle is a quarter of a second here,
and the machine has other things to do."""


def models() -> str:
    """The models.toml."""
    return MODELS.format(klein=sdcpp_models.klein(), shapes=SHAPES_DIR)


class Mixed(NamedTuple):
    """A farm that is up, and a client of it."""

    up: Up
    farm: Farm

    def workers(self) -> dict[str, Worker]:
        """By engine."""
        return {worker.engine: worker for worker in self.farm.workers()}

    def done(self, batch_id: str) -> list[Job]:
        """The jobs of a batch, all succeeded: each on the engine that its picture names too."""
        status = self.farm.wait(batch_id, 600)
        assert status.counts["succeeded"] == status.total, self.up.text()
        pictures = list(self.farm.pictures(batch_id))
        assert len(pictures) == status.total
        digests = {engine: w.info["weights_sha256"][:10] for engine, w in self.workers().items()}
        for job in pictures:
            assert job.engine
            text = Image.open(io.BytesIO(self.farm.fetch(job))).info["parameters"]
            assert text.startswith(job.spec["prompt"] + "\n")
            assert f"Engine: {job.engine}," in text
            assert f"Model hash: {digests[job.engine]}," in text
        return pictures


@contextmanager
def mixed(home: Path, *lanes: str) -> Iterator[Mixed]:
    """`farm up` with a worker for each lane, each on one thread and in 8 GB."""
    home.mkdir()
    (home / "models.toml").write_text(models())
    args = [word for lane in lanes for word in ("--model", lane)]
    with ExitStack() as stack:
        args += ["--threads", "1", "--memory-limit", "8GB"]
        up = Up(home, *args, session_ttl_s=4, bundle_seconds=0.25)
        stack.callback(up.end)
        up.until_ready(120)
        settings = load_settings(home=home, models_file=home / "models.toml")
        yield Mixed(up, stack.enter_context(Farm(settings)))


def test_each_job_ends_on_its_engine_and_every_prompt_comes_back(tmp_path: Path) -> None:
    with mixed(tmp_path / "home", "shapes", "klein") as both:
        workers = both.workers()
        assert {w.model: engine for engine, w in workers.items()} == ENGINES
        assert {w.info["versions"]["threads"] for w in workers.values()} == {"1"}
        assert workers["sdcpp"].info["memory"] == 8 * 10**9
        rows = [
            {"prompt": prompt, "model": model, "seed": seed}
            for prompt in PROMPTS.values()
            for model in ENGINES
            for seed in (1, 2)
        ]
        pictures = both.done(both.farm.submit(rows, name="mixed").id)
        assert len(pictures) == len(rows)
        for job in pictures:
            assert job.engine == ENGINES[job.spec["model"]]
            assert job.spec["prompt"] == rows[job.idx]["prompt"]
        assert len({job.sha256 for job in pictures}) == len(rows)


def test_two_lanes_share_one_backlog_by_their_speed(tmp_path: Path) -> None:
    with mixed(tmp_path / "home", "duo:diffusers", "duo:sdcpp") as both:
        assert set(both.workers()) == {"diffusers", "sdcpp"}
        asked = [{"prompt": f"a cat, {n}", "engine": ("sdcpp", "diffusers")[n % 2]}
                 for n in range(24)]  # fmt: skip
        first = both.farm.submit(asked, model="duo")
        for job in both.done(first.id):  # and their speed is known now
            assert job.engine == asked[job.idx]["engine"]

        batch = both.farm.submit([f"a dog, {n}" for n in range(PICTURES)], model="duo")
        jobs = both.done(batch.id)
        counts = Counter(job.engine for job in jobs)
        assert set(counts) == {"diffusers", "sdcpp"}
        means = {e: mean(j.render_s or 0.0 for j in jobs if j.engine == e) for e in counts}
        heard = PICTURES + len(asked)  # with the next heartbeat
        until(lambda: sum(w.rendered for w in both.workers().values()) == heard, 30)
        told = {engine: w.seconds_per_picture for engine, w in both.workers().items()}
        print(f"pictures {dict(counts)}, seconds a picture {means}, as the workers tell {told}")
        split = counts["diffusers"] / counts["sdcpp"]
        expected = means["sdcpp"] / means["diffusers"]
        assert expected / WITHIN < split < expected * WITHIN, (counts, means)


def test_a_cancelled_render_of_native_code_gives_way_to_the_next(
    tmp_path: Path, redis_url: str
) -> None:
    with FarmKit(tmp_path / "home", redis_url, models=models()) as kit:
        kit.dispatcher()
        worker = kit.worker("klein", "sdcpp")
        before = engine_child(worker).pid
        endless = kit.farm.submit([{"prompt": "a cat", "model": "klein", "steps": 500, "width": 512,
                                    "height": 512}])  # fmt: skip
        until(lambda: kit.farm.job(f"{endless.id}/0").started_at is not None, 30)
        kit.farm.cancel(endless.id)
        after = kit.farm.submit([{"prompt": "a dog", "model": "klein"}])
        assert kit.farm.wait(endless.id, 30).counts["cancelled"] == 1
        assert kit.farm.wait(after.id, 30).counts["succeeded"] == 1
        assert engine_child(worker).pid != before
        assert kit.farm.status(after.id).counts["failed"] == 0
