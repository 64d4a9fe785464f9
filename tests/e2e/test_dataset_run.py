"""A dataset of 2,000 rows on real processes: killed, failed, driven anew, it has the same bytes.

With DATASET_MODEL=shapes the killed run is rendered by the demo model instead of the fake engine
(`make dataset-kills`; some ten minutes).
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from farm.blobs import BlobStore, open_blobs
from farm.demo.run import prompts as shapes_prompts
from tests.farm_kit import FarmKit
from tests.recipe_kit import farm_command, shard_hashes, write_recipe
from tests.servers import S3Server

MODEL = os.environ.get("DATASET_MODEL", "fake-fast")
REAL = not MODEL.startswith("fake")
ROWS, SHARD, KILLS = 2_000, 100, 5
pytestmark = pytest.mark.timeout(1800 if REAL else 600)  # some ten processes, one after the other
FRAGILE = frozenset(n for shard in (2, 7, 11) for n in range(shard * SHARD, (shard + 1) * SHARD, 5))
MODELS = """
[models.fake-fast]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 1 }}
[models.fake-fast.engines.fake]
micro_batch = 8
options = {{ seconds_per_step = 0.01, fragile = "{fragile}" }}
"""


class Stage:
    """A farm with two workers and one recipe; `place` is where its dataset goes."""

    def __init__(self, kit: FarmKit, folder: Path, place: BlobStore, recipe: Path) -> None:
        self.kit, self.folder, self.place, self.recipe = kit, folder, place, recipe
        self.fragile = folder / "fragile"

    def run(self, verb: str = "run") -> tuple[int, dict[str, Any]]:
        """`farm dataset run` to its end: exit code and summary."""
        process = farm_command(self.kit.env, "dataset", verb, str(self.recipe), "--json")
        out, err = process.communicate(timeout=600 if REAL else 200)
        assert process.returncode in (0, 1), err.decode()
        summary: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert "error" not in summary, err.decode()
        return process.returncode, summary


def _text(n: int) -> str:
    return f"{'fragile' if n in FRAGILE else 'plain'} picture {n} ☂"


@contextmanager
def stage(
    folder: Path, redis: str, *, out: str = "out", s3: S3Server | None = None, **told: Any
) -> Iterator[Stage]:
    models = MODELS.format(fragile=folder / "fragile")
    texts = shapes_prompts(ROWS) if REAL else [_text(n) for n in range(ROWS)]
    lines = "".join(json.dumps({"prompt": text, "id": n}) + "\n" for n, text in enumerate(texts))
    folder.mkdir()
    (folder / "prompts.jsonl").write_text(lines)
    recipe = write_recipe(
        folder,
        out=out,
        shard_size=SHARD,
        formats=["webdataset", "parquet"],
        prompts={"file": "prompts.jsonl", "keep": {"id": "int"}},
        params={"model": MODEL, "guidance_scale": {"choice": [3, 5.5]}},
    )
    told |= {"max_failures": 1, "session_ttl_s": 30}  # no worker is lost here
    options = s3.options() if s3 else None
    where = out if s3 else str(folder / out)
    with (
        FarmKit(folder / "home", redis, models=models, s3=options, **told) as kit,
        closing(open_blobs(where, s3=options)) as place,
    ):
        kit.dispatcher()
        worker = (MODEL, "diffusers", "--strict") if REAL else (MODEL, "fake")
        kit.worker(*worker, wait_s=0)
        kit.worker(*worker)
        yield Stage(kit, folder, place, recipe)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, redis_server: Any) -> dict[str, str]:
    """The hashes of the shards of a run that nothing happened to."""
    redis_server.start()
    redis_server.flushall()
    with stage(tmp_path_factory.mktemp("calm") / "run", redis_server.url) as calm:
        code, summary = calm.run()
        assert (code, summary["counts"]["accepted"]) == (0, ROWS)
        _assert_rows(calm)
        return shard_hashes(calm.place)


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, redis_url: str, undisturbed: dict[str, str]
) -> None:
    draw = random.Random(6)
    with stage(tmp_path / "run", redis_url) as shaken:
        for _ in range(KILLS):
            process = farm_command(shaken.kit.env, "dataset", "run", str(shaken.recipe), "--json")
            with process:
                assert process.stdout
                for _ in range(draw.randint(1, 6)):  # the batch, then a few shards
                    process.stdout.readline()
                process.kill()
        code, summary = shaken.run()
        assert (code, summary["counts"]["accepted"]) == (0, ROWS)
        assert summary["kept"] > 0
        assert shard_hashes(shaken.place) == undisturbed
        assert len(shaken.kit.farm.batches()) == 1


@pytest.mark.skipif(REAL, reason="the demo model fails no row")
def test_failed_rows_land_where_they_belong(
    tmp_path: Path,
    redis_url: str,
    pg_url: str,
    s3_server: S3Server,
    s3_bucket: str,
    undisturbed: dict[str, str],
) -> None:
    out = f"s3://{s3_bucket}/sets/test"
    with stage(tmp_path / "run", redis_url, out=out, s3=s3_server, database_url=pg_url) as failing:
        failing.fragile.write_text("fragile")
        code, summary = failing.run()
        assert code == 1
        assert summary["counts"]["failed"] == len(FRAGILE) == ROWS * 3 // 100
        before = shard_hashes(failing.place)
        times = {one.key: one.modified for one in failing.place.list()}
        assert before != undisturbed

        failing.fragile.unlink()
        code, summary = failing.run("redrive")
        assert (code, summary["counts"]["accepted"]) == (0, ROWS)
        assert (summary["written"], summary["kept"]) == (3, ROWS // SHARD - 3)
        assert summary["rendered"] == len(FRAGILE)
        after = shard_hashes(failing.place)
        assert after == undisturbed
        for key, sha256 in after.items():
            if before[key] == sha256:
                shard = int(key.rpartition("-")[2].partition(".")[0])
                assert shard not in (2, 7, 11)
                found = failing.place.stat(key)
                assert found
                assert found.modified == times[key], f"{key} was written again"


def _assert_rows(calm: Stage) -> None:
    """Every picture of every format is the one that the farm rendered for the row."""
    import pyarrow.parquet as pq

    (batch,) = calm.kit.farm.batches()
    jobs = list(calm.kit.farm.pictures(batch.id))
    tables = [pq.read_table(io.BytesIO(calm.place.get(one.key))) for one in calm.place.list("par")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == [job.idx for job in jobs] == list(range(ROWS))
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [row["prompt"] for row in rows] == [job.spec["prompt"] for job in jobs]
    assert [row["sha256"] for row in rows] == [job.sha256 for job in jobs]
    for row, job in zip(rows[::97], jobs[::97], strict=True):
        picture = calm.kit.farm.fetch(job)
        assert row["image"]["bytes"] == picture
        assert Image.open(io.BytesIO(picture)).size == (64, 64)
