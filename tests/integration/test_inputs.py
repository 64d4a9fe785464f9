"""Input pictures through real workers: from the submit to the engine, also when storage fails."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from farm.store.reads import Job
from tests.farm_kit import FarmKit, until
from tests.servers import S3Server

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def png(pixels: NDArray[np.uint8] = PIXELS) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def kit(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarmKit]:
    monkeypatch.chdir(tmp_path)
    with FarmKit(tmp_path / "home", redis_url) as kit:
        kit.dispatcher()
        yield kit


def rendered(kit: FarmKit, job: Job) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(kit.farm.fetch(job))))


def test_the_engine_gets_each_job_s_own_pictures(kit: FarmKit) -> None:
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Path("a.png").write_bytes(png())
    Path("b.png").write_bytes(png(255 - PIXELS))
    Path("mask.png").write_bytes(png(half))
    rows: list[dict[str, object]] = [
        {"prompt": "the same", "init_image": "a.png", "strength": 0.0},
        {"prompt": "another", "init_image": "b.png", "strength": 0.0},
        {"prompt": "half new", "init_image": "a.png", "mask_image": "mask.png", "strength": 1.0},
        {"prompt": "text only"},
    ] * 8  # fmt: skip
    kit.worker()
    batch = kit.farm.submit(rows, seed=5)
    status = kit.farm.wait(batch.id, 60)
    assert status.counts["succeeded"] == len(rows), kit.log("worker-fake-one")
    for job in kit.farm.pictures(batch.id):
        found = rendered(kit, job)
        match job.idx % 4:
            case 0:
                assert (found == PIXELS).all()
            case 1:
                assert (found == 255 - PIXELS).all()
            case 2:
                assert (found[:, :32] == PIXELS[:, :32]).all()
                assert (found[:, 32:] != PIXELS[:, 32:]).any()
            case _:
                assert (found != PIXELS).any()
    assert len(list(kit.farm.blobs.list("inputs/"))) == 3
    kit.assert_whole(batch.id)

    second = kit.farm.submit(
        [{"prompt": "on", "init_image": f"job:{batch.id}/2", "strength": 0.0},
         {"prompt": "on", "init_image": f"job:{batch.id[:12]}-0000002", "strength": 0.0}]
    )  # fmt: skip
    kit.farm.wait(second.id, 60)
    before = rendered(kit, kit.farm.job(f"{batch.id}/2"))
    assert [(rendered(kit, job) == before).all() for job in kit.farm.pictures(second.id)] == [1, 1]


def test_a_picture_that_is_gone_or_changed_fails_its_job_and_no_other(kit: FarmKit) -> None:
    for n in range(3):
        Path(f"{n}.png").write_bytes(png(PIXELS // (n + 1)))
    rows = [{"prompt": "x", "init_image": f"{n % 3}.png"} for n in range(6)]
    batch = kit.farm.submit(rows, model="fake-one")
    keys = [str(job.spec["init_image"]) for job in kit.farm.jobs(batch.id)]
    kit.farm.blobs.delete([keys[0]])
    kit.farm.blobs.put(keys[1], kit.farm.blobs.get(keys[2]), "image/png")
    kit.worker()
    assert kit.farm.wait(batch.id, 60).counts == {
        "queued": 0, "running": 0, "succeeded": 2, "failed": 4, "cancelled": 0,
    }  # fmt: skip
    assert kit.farm.failures(batch.id) == {"ERR_INVALID_PARAMETER": 4}
    told = [job.error or "" for job in kit.farm.jobs(batch.id, ["failed"])]
    assert ["gone" in text for text in told] == [True, False, True, False]
    kit.farm.blobs.delete([keys[1]])
    kit.farm.submit(rows, model="fake-one")  # as the sentences say
    assert kit.farm.retry(batch.id) == 4
    assert kit.farm.wait(batch.id, 60).counts["succeeded"] == 6


def test_jobs_wait_without_a_failure_while_the_store_is_away(
    tmp_path: Path, redis_url: str, s3_server: S3Server, s3_bucket: str
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with FarmKit(
        tmp_path / "home", redis_url, blobs_url=f"s3://{s3_bucket}", s3=s3_server.options()
    ) as kit:
        kit.dispatcher()
        batch = kit.farm.submit(
            [{"prompt": "x", "init_image": str(tmp_path / "a.png"), "strength": 0.0}] * 3,
            model="fake-one",
        )
        s3_server.stop()
        kit.worker()
        ref = kit.farm.job(f"{batch.id}/0").ref
        until(lambda: kit.farm.history(ref), 60)
        assert kit.farm.history(ref)[0]["code"] == "ERR_STORAGE_UNAVAILABLE"
        assert kit.farm.job(ref).failures == 0
        until(lambda: [worker.state for worker in kit.farm.workers()] == ["waiting"], 30)
        s3_server.start()
        assert kit.farm.wait(batch.id, 90).counts["succeeded"] == 3
        assert all((rendered(kit, job) == PIXELS).all() for job in kit.farm.pictures(batch.id))
        assert all(job.failures == 0 for job in kit.farm.jobs(batch.id))
