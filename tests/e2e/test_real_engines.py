"""The whole farm with the real diffusers pipeline, PostgreSQL, Redis and a real S3 server."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farm.store.reads import Job
from tests.farm_kit import FarmKit, engine_child, until
from tests.models import tiny
from tests.servers import S3Server

SIDE_BY_SIDE = """
[models.tiny-sdxl]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 3, guidance_scale = 3.0 }}
[models.tiny-sdxl.engines.diffusers]
path = "{path}"
dtype = "float32"
micro_batch = 2
"""


@pytest.fixture
def kit(
    tmp_path: Path, redis_url: str, pg_url: str, s3_server: S3Server, s3_bucket: str
) -> Iterator[FarmKit]:
    models = SIDE_BY_SIDE.format(path=tiny("sdxl"))
    with FarmKit(
        tmp_path / "home", redis_url, database_url=pg_url, models=models,
        blobs_url=f"s3://{s3_bucket}/nightly", s3=s3_server.options(),
    ) as kit:  # fmt: skip
        kit.dispatcher()
        yield kit


def picture(kit: FarmKit, job: Job) -> Image.Image:
    return Image.open(io.BytesIO(kit.farm.fetch(job)))


def test_two_models_side_by_side_each_take_their_own_jobs(kit: FarmKit) -> None:
    kit.worker("shapes", "diffusers", "--threads", "1")
    kit.worker("tiny-sdxl", "diffusers", "--threads", "1")
    hashes = {w.model: w.info["weights_sha256"][:10] for w in kit.farm.workers()}
    assert len(set(hashes.values())) == 2
    rows = [
        {"prompt": f"a {colour} circle on a white background", "model": model, "seed": 7}
        for colour in ("red", "blue", "green", "yellow", "black")
        for model in hashes
    ]
    batch = kit.farm.submit(rows, name="mixed")
    status = kit.farm.wait(batch.id, 120)
    assert status.counts["succeeded"] == 10, kit.log("worker-shapes")
    assert {m: c["succeeded"] for m, c in status.by_model.items()} == dict.fromkeys(hashes, 5)
    for job in kit.farm.pictures(batch.id):
        image = picture(kit, job)
        text = image.info["parameters"]
        assert job.spec["prompt"] in text
        assert f"Model hash: {hashes[job.spec['model']]}" in text
        if job.spec["model"] == "shapes":
            corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert corners.min() > 180, "the shapes model paints the background white"
    kit.assert_whole(batch.id)
    assert kit.farm.blobs.url(job.object_key or "").startswith(kit.env["FARM_S3_ENDPOINT_URL"])


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_kill_during_a_real_render(kit: FarmKit, victim: str) -> None:
    worker = kit.worker("shapes", "diffusers", "--threads", "1", "--strict")
    prompts = [{"prompt": f"a red star on a {c} background", "seed": i, "steps": 20}
               for i, c in enumerate(["blue", "white", "green"] * 8)]  # fmt: skip
    batch = kit.farm.submit(prompts)
    until(lambda: kit.farm.status(batch.id).counts["succeeded"] >= 1, 60)
    if victim == "child":
        engine_child(worker).kill()
    else:
        worker.kill()
        worker.wait(30)
        kit.worker("shapes", "diffusers", "--threads", "1", "--strict")
    status = kit.farm.wait(batch.id, 180)
    assert status.counts["succeeded"] == 24
    kit.assert_whole(batch.id, orphans=victim == "worker")
    again = kit.farm.wait(kit.farm.submit(prompts, reuse=False).id, 180)
    first, second = ([j.sha256 for j in kit.farm.pictures(b)] for b in (batch.id, again.id))
    assert first == second, "in strict mode a retried picture has the same bytes"
