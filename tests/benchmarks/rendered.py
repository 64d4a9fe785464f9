"""A farm whose rows are all rendered: what a dataset's run costs beside the renders."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import bindparam, update

from farm.config import Settings
from farm.datasets.batches import Batches
from farm.datasets.recipe import Recipe
from farm.pictures import object_key
from farm.service import Farm
from farm.states import JobState
from farm.store import schema
from farm.store.ids import JobRef, claim_in
from farm.store.tables import counts, jobs
from tests.farm_kit import FAKES
from tests.recipe_kit import Quiet
from tests.runner_kit import NoBroker

CHUNK = 10_000
SESSION = "0" * 32
T = TypeVar("T")


class Drawn:
    """A blob store of pictures that are drawn as they are read; `picture`: of a row."""

    def __init__(self, picture: Callable[[int], bytes]) -> None:
        self._picture = picture

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """It will be drawn again."""

    def get(self, key: str) -> bytes:
        found = claim_in(key)
        assert found
        return self._picture(found[0].idx)

    def close(self) -> None:
        pass


def open_farm(home: Path, blobs: Drawn | None = None) -> Farm:
    """On SQLite, with the fake models and no broker; `blobs`: instead of a local directory."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "models.toml").write_text(FAKES, encoding="utf-8")
    farm = Farm(Settings(home=home, models_file=home / "models.toml"))
    farm.__dict__["broker"] = NoBroker()
    if blobs:
        farm.__dict__["blobs"] = blobs
    schema.upgrade(farm.db)
    return farm


def render(farm: Farm, recipe: Recipe, picture: Callable[[int], bytes]) -> None:
    """Submit the recipe's rows, and store and record `picture(row)` for each."""
    batch = Batches(farm, recipe, "", 0, False, Quiet()).main()
    told = {
        "state": JobState.SUCCEEDED, "claim_no": 1, "engine": "fake", "started_at": 1.0,
        "finished_at": 2.0, "render_s": 1.0, "fingerprint": "f" * 64,
    }  # fmt: skip
    mine = (jobs.c.batch_id == batch.id, jobs.c.idx == bindparam("row"))
    for begin in range(0, batch.total, CHUNK):
        some = range(begin, min(begin + CHUNK, batch.total))
        rows = [told | _stored(farm, JobRef(batch.id, row), picture(row)) for row in some]
        with farm.db.write() as connection:
            connection.execute(update(jobs).where(*mine), rows)
    done = update(counts).where(counts.c.batch_id == batch.id)
    with farm.db.write() as connection:
        connection.execute(done.values(queued=0, succeeded=batch.total))


def _stored(farm: Farm, ref: JobRef, data: bytes) -> dict[str, Any]:
    key = object_key(ref, 1, SESSION, "png")
    farm.blobs.put(key, data, "image/png")
    sha256 = hashlib.sha256(data).hexdigest()
    return {"row": ref.idx, "object_key": key, "sha256": sha256, "size_bytes": len(data)}


def in_process(way: Callable[..., T], *args: Any) -> T:
    """`way` of these, in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(way, *args).result()
