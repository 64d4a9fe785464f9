"""Input pictures from the blob store to the worker, and as engines take them."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm.blobs import BlobStore
from farm.errors import InvalidParameter, StorageUnavailable
from farm.inputs import picture_key
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from tests.picture_kit import PIXELS, Counted, bomb, picture
from tests.store_kit import spec
from workers.engines.input_pictures import init_picture, mask_picture
from workers.inputs import Inputs


@pytest.fixture
def blobs(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "blobs")


# ---- from the store to the worker


def claim(idx: int, **pictures: str) -> Claim:
    fields = {**pictures, "strength": 0.5} if pictures else {}
    return Claim(JobRef("0abc", idx), 1, "s", spec(**fields), 0, False)  # type: ignore[arg-type]


def stored(blobs: BlobStore, n: int) -> list[str]:
    keys = []
    for quality in range(n):
        data = picture("JPEG", quality=50 + quality)
        keys.append(picture_key(data))
        blobs.put(keys[-1], data, "image/jpeg")
    return keys


def test_a_worker_fetches_each_picture_once(blobs: Counted) -> None:
    keys = stored(blobs, 3)
    inputs = Inputs(blobs)
    claims = [claim(0), *(claim(i, init_image=keys[i % 3], mask_image=keys[0]) for i in range(9))]
    for _ in range(2):
        fetched = inputs.fetch(claims)
        assert fetched.ready == claims
        assert set(fetched.files) == set(keys)
    assert blobs.gets == 3
    assert inputs.fetch([]).ready == []
    inputs.close()


def test_what_is_gone_or_changed_fails_its_own_jobs_only(blobs: Counted) -> None:
    good, gone, changed = stored(blobs, 3)
    blobs.delete([gone])
    blobs.put(changed, blobs.get(good), "image/jpeg")
    claims = [claim(0, init_image=gone), claim(1, init_image=good), claim(2),
              claim(3, init_image=good, mask_image=changed)]  # fmt: skip
    inputs = Inputs(blobs)
    fetched = inputs.fetch(claims)
    assert fetched.ready == [claims[1], claims[2]]
    assert [(c, type(error)) for c, error in fetched.refused] == [
        (claims[0], InvalidParameter), (claims[3], InvalidParameter),
    ]  # fmt: skip
    assert "is gone; submit the same picture again" in fetched.refused[0][1].message
    assert "was changed" in fetched.refused[1][1].message
    blobs.put(changed, picture("JPEG", quality=52), "image/jpeg")
    assert inputs.fetch(claims[3:]).ready == claims[3:], "a bad one is not kept"
    inputs.close()


class Away(Counted):
    tried = 0

    def get(self, key: str) -> bytes:
        self.tried += 1
        raise StorageUnavailable("the store is away")


def test_a_store_that_is_away_is_asked_once_a_bundle(blobs: Counted) -> None:
    keys = stored(blobs, 30)
    claims = [claim(99), *(claim(i, init_image=key) for i, key in enumerate(keys))]
    away = Away(blobs.root)
    inputs = Inputs(away)
    fetched = inputs.fetch(claims)
    assert fetched.ready == claims[:1]
    assert [c for c, _ in fetched.refused] == claims[1:]
    assert {type(error) for _, error in fetched.refused} == {StorageUnavailable}
    assert away.tried <= 8
    inputs.close()


def test_memory_is_bounded(blobs: Counted) -> None:
    keys = stored(blobs, 40)
    sizes = {key: len(blobs.get(key)) for key in keys}
    most = 3 * max(sizes.values())
    inputs = Inputs(blobs, most)
    waiting = [claim(i, init_image=key) for i, key in enumerate(keys)]
    rendered: list[Claim] = []
    while waiting:
        fetched = inputs.fetch(waiting)
        assert fetched.ready, "a bundle gets on"
        assert len(fetched.files) <= 8
        assert sum(map(len, inputs._kept.values())) == inputs._kept_bytes <= most
        rendered += fetched.ready
        waiting = fetched.later
    assert rendered == [claim(i, init_image=key) for i, key in enumerate(keys)]
    inputs.close()


def test_two_threads_share_the_kept_ones(blobs: Counted) -> None:
    keys = stored(blobs, 20)
    inputs = Inputs(blobs, 4 * len(blobs.get(keys[0])))
    claims = [claim(i, init_image=key) for i, key in enumerate(keys)]
    faults: list[object] = []

    def fetch() -> None:
        for one in claims * 5:
            found = inputs.fetch([one])
            faults.extend([found] if found.ready != [one] else [])

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert sum(map(len, inputs._kept.values())) == inputs._kept_bytes
    inputs.close()


# ---- as engines take them


def saved(image: Image.Image, form: str = "PNG", **how: Any) -> dict[str, bytes]:
    out = io.BytesIO()
    image.save(out, form, **how)
    return {KEY: out.getvalue()}


KEY = f"inputs/{'a' * 64}.png"
JOB = spec(init_image=KEY, mask_image=KEY, strength=0.5)


def test_other_shapes_cover_the_job_s_size_undistorted() -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = PIXELS[:1].mean(axis=(0, 1)).astype(np.uint8)
    found = init_picture(JOB, saved(Image.fromarray(wide)))
    assert found
    assert (np.asarray(found) == wide[:, 64:128]).all(), "the middle"


def test_orientation_transparency_and_depth_are_heeded() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    square = np.asarray(Image.fromarray(PIXELS).resize((64, 64)))
    turned = init_picture(JOB, saved(Image.fromarray(square), exif=exif))
    assert turned
    assert (np.asarray(turned) == square[::-1, ::-1]).all()
    clear = init_picture(JOB, saved(Image.new("RGBA", (64, 64), (9, 9, 9, 0))))
    assert clear
    assert clear.getextrema() == ((255, 255),) * 3
    deep = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for take in (init_picture, mask_picture):
        grey = take(JOB, saved(Image.fromarray(deep)))
        assert grey
        assert abs(np.asarray(grey).mean() - 127.5) < 1


def test_a_mask_is_black_and_white() -> None:
    grey = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    found = mask_picture(JOB.model_copy(update={"width": 256}), saved(Image.fromarray(grey)))
    assert found
    assert (np.asarray(found) == np.where(grey >= 128, 255, 0)).all()


@pytest.mark.parametrize("data", [b"", b"text", picture()[:-2000], bomb(30_000), bomb(9_000)])
def test_an_engine_refuses_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(InvalidParameter, match="init_image"):
        init_picture(JOB, {KEY: data})
    with pytest.raises(InvalidParameter, match="did not come"):
        init_picture(JOB, {})
