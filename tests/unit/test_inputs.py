"""Input pictures from a row to the blob store."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from farm.blobs.local import LocalBlobs
from farm.errors import InvalidParameter, InvalidPromptFile, NotFound, StorageUnavailable
from farm.inputs import MAX_BYTES, InputPictures, absolute, picture_key
from farm.service import Farm
from farm.spec import JobSpec
from tests.picture_kit import PIXELS, Counted, animated, bomb, picture


@pytest.fixture
def blobs(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "blobs")


@pytest.fixture
def pictures(blobs: Counted, tmp_path: Path) -> Iterator[InputPictures]:
    def rendered(name: str) -> bytes:
        if name != "0abc/1":
            raise NotFound(f"no job {name}")
        return picture("WEBP")

    with InputPictures(lambda: blobs, rendered, tmp_path) as pictures:
        yield pictures


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Farm.open(home=tmp_path / "home") as farm:
        yield farm


# ---- from a row to the store


@pytest.mark.parametrize(
    ("form", "how", "extension"),
    [
        ("PNG", {}, "png"), ("JPEG", {}, "jpg"), ("WEBP", {}, "webp"),
        ("MPO", {"save_all": True, "append_images": [Image.fromarray(PIXELS)]}, "jpg"),
    ],
)  # fmt: skip
def test_a_file_is_stored_once_under_its_hash(
    pictures: InputPictures, blobs: Counted, tmp_path: Path, form: str, how: Any, extension: str
) -> None:
    data = picture(form, **how)
    for name in ("one.png", "same.bin"):  # the ending says nothing
        (tmp_path / name).write_bytes(data)
    key = pictures.take("one.png")
    assert key == f"inputs/{hashlib.sha256(data).hexdigest()}.{extension}"
    (tmp_path / "one.png").unlink()
    assert pictures.take("one.png") == key, "read once"
    pictures.settle()
    assert pictures.take("same.bin") == key
    pictures.settle()
    assert blobs.puts == 1
    assert blobs.get(key) == data


def test_an_object_that_was_cut_is_mended(
    pictures: InputPictures, blobs: Counted, tmp_path: Path
) -> None:
    data = picture()
    blobs.put(picture_key(data), data[:-9], "image/png")
    (tmp_path / "a.png").write_bytes(data)
    key = pictures.take("a.png")
    pictures.settle()
    assert blobs.get(key) == data


def test_pictures_of_the_store_and_of_jobs(pictures: InputPictures, blobs: Counted) -> None:
    blobs.put("pictures/x/1.png", picture(), "image/png")
    key = pictures.take("blob:pictures/x/1.png")
    pictures.settle()
    assert pictures.take(key) == pictures.take(f"blob:{key}") == key
    assert pictures.take("job:0abc/1") == picture_key(picture("WEBP"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("https://example.org/cat.png", "download it first"),
        ("file:///etc/passwd", "download it first"),
        ("data:image/png;base64,AAAA", "download it first"),
        ("missing.png", "No such file"),
        ("a\0b", "no file can have that name"),
        (".", "Is a directory"),
        ("/dev/zero", "no regular file"),
        ("fifo", "no regular file"),
        ("empty", "empty"),
        ("text", "no PNG, JPEG or WebP"),
        ("blob:pictures/none.png", "no such object"),
        ("blob:../../etc/passwd", "bad blob key"),
        ("blob:", "1 to 512"),
        ("job:0abc/2", "no job"),
        (f"inputs/{'0' * 64}.png", "no such object"),
    ],
)
def test_what_is_no_picture_is_said(
    pictures: InputPictures, blobs: Counted, tmp_path: Path, given: str, why: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("GIF89a no")
    for _ in range(2):
        with pytest.raises(InvalidParameter, match=why):
            pictures.take(given)
    pictures.settle()
    assert blobs.puts == 0


@pytest.mark.parametrize(
    "data",
    [
        picture()[:-2000], picture("JPEG", size=(640, 480))[:5000],
        picture("WEBP", size=(640, 480))[:5000], picture("GIF"), picture("BMP"),
        bomb(30_000), bomb(9_000), animated("PNG"), animated("WEBP"), picture()[:33],
        picture()[:60] + b"\0" * 500, b"\0" * (MAX_BYTES + 1), b"\xff\xd8\xff",
    ],
    ids=[
        "cut png", "cut jpeg", "cut webp", "gif", "bmp", "bomb", "81 megapixels", "apng",
        "animated webp", "head only", "zeros within", "large", "jpeg magic",
    ],
)  # fmt: skip
def test_broken_and_hostile_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidParameter, match=r"^it ") as caught:
        picture_key(data)
    assert len(caught.value.message) < 200


CHUNK = struct.pack(">I4sI", 0, b"abCd", zlib.crc32(b"abCd"))
JPEG = picture("JPEG")
PROGRESSIVE = picture("JPEG", progressive=True)
SCANS = PROGRESSIVE[PROGRESSIVE.index(b"\xff\xda") : -2]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (picture()[:33] + CHUNK * 60_000 + picture()[33:], "PNG of more than"),
        (picture()[:-12] + CHUNK * 60_000 + picture()[-12:], "PNG of more than"),
        (JPEG[:2] + b"\xff\xe5\0\2" * 6_000 + JPEG[2:], "more than 5,000 segments"),
        (JPEG[:2] + b"\xff" * 6_000 + JPEG[2:], "more than 5,000 segments"),
        (PROGRESSIVE[:-2] + SCANS * 200 + b"\xff\xd9", "scans"),
        (picture("JPEG", (7_000, 7_000), progressive=True)[:-2] + SCANS * 4, "scans"),
    ],
    ids=["chunks", "chunks at the end", "segments", "fill", "scans", "scans of a large one"],
)
def test_files_that_would_keep_a_decoder_busy_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidParameter, match=why):
        picture_key(data)


def test_large_pictures_of_many_pieces_are_taken() -> None:
    assert picture_key(picture("JPEG", (7_000, 7_000), progressive=True))
    assert picture_key(picture("JPEG", icc_profile=bytes(60_000 * 30)))
    assert picture_key(picture()[:33] + CHUNK * 10_000 + picture()[33:])


def test_without_a_base_no_local_file_is_read(blobs: Counted, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    with (
        InputPictures(lambda: blobs, lambda name: b"", None) as pictures,
        pytest.raises(InvalidParameter, match="upload it first"),
    ):
        pictures.take(str(tmp_path / "a.png"))


def test_rows_from_elsewhere_name_uploads_and_their_owner_s_jobs_only(farm: Farm) -> None:
    (job,) = farm.jobs(farm.submit("a", owner="ann").id)
    farm.blobs.put("pictures/a.png", picture(), "image/png")
    for given, owner, why in (
        ("blob:pictures/a.png", "ann", "uploaded"),
        (f"job:{job.id}", "bob", "of this owner"),
        (f"job:{job.id}", "", "of this owner"),
        (f"job:{job.id}", "ann", "is queued: it has no picture"),
    ):
        with pytest.raises(InvalidPromptFile) as caught:
            farm.submit([{"prompt": "b", "init_image": given}], owner=owner, files=False)
        assert why in caught.value.errors[0].got


def test_only_paths_are_made_absolute(tmp_path: Path) -> None:
    assert absolute("a.png", tmp_path) == str(tmp_path / "a.png")
    assert absolute("/b.png", tmp_path) == "/b.png"
    for name in ("blob:a", "job:latest/1", "https://x/y", "data:x", f"inputs/{'0' * 64}.png"):
        assert absolute(name, tmp_path) == name


# ---- the whole submit


def test_relative_paths_begin_where_they_were_written(farm: Farm, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "a.png").write_bytes(picture("PNG"))
    Path("a.png").write_bytes(picture("JPEG"))
    Path("mask.png").write_bytes(picture("WEBP"))
    (there / "rows.csv").write_text("prompt,init_image,strength\nx,a.png,0.5\ny,,\n")
    batch = farm.submit_file(there / "rows.csv", init_image="a.png", mask_image="mask.png")
    found = [(job.spec["init_image"], job.spec["mask_image"]) for job in farm.jobs(batch.id)]
    png, jpeg, webp = (picture_key(picture(form)) for form in ("PNG", "JPEG", "WEBP"))
    assert found == [(png, webp), (jpeg, webp)]
    assert {blob.key for blob in farm.blobs.list("inputs/")} == {png, jpeg, webp}
    again = farm.submit([{"prompt": "z", "init_image": Path("a.png")}])
    assert [job.spec["init_image"] for job in farm.jobs(again.id)] == [jpeg]


def test_bad_pictures_are_row_errors_and_nothing_is_queued(farm: Farm) -> None:
    Path("good.png").write_bytes(picture())
    Path("bad.png").write_bytes(picture()[:-2000])
    rows = [
        {"prompt": "a", "init_image": "good.png"},
        {"prompt": "b", "init_image": "bad.png", "width": 13},
        {"prompt": "c", "init_image": "job:latest/0"},
        {"prompt": "d", "init_image": "good.png", "mask_image": "https://x/y.png"},
    ]
    with pytest.raises(InvalidPromptFile) as caught:
        farm.submit(rows)
    told = [(e.line, e.field) for e in caught.value.errors]
    assert told == [(2, "init_image"), (2, "width"), (3, "init_image"), (4, "mask_image")]
    assert "'bad.png': it cannot be read" in caught.value.errors[0].got
    assert farm.batches() == []
    with pytest.raises(InvalidPromptFile):
        farm.submit([{"prompt": "a", "init_image": "good.png"}], files=False)


def test_an_uploaded_picture(farm: Farm) -> None:
    key = farm.add_input(picture())
    batch = farm.submit([{"prompt": "a", "init_image": f"blob:{key}"}], files=False)
    assert [job.spec["init_image"] for job in farm.jobs(batch.id)] == [key]


def test_a_store_that_is_away_at_submit_queues_nothing(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object) -> None:
        raise StorageUnavailable("the store is away")

    Path("good.png").write_bytes(picture())
    monkeypatch.setattr(LocalBlobs, "put", away)
    with pytest.raises(StorageUnavailable):
        farm.submit([{"prompt": "a", "init_image": "good.png"}])
    assert farm.batches() == []


def test_a_spec_may_be_submitted_again(farm: Farm) -> None:
    Path("a.png").write_bytes(picture())
    batch = farm.submit([{"prompt": "a", "init_image": "a.png", "seed": 3}])
    (job,) = farm.jobs(batch.id)
    again = farm.submit([job.spec])
    (same,) = farm.jobs(again.id)
    assert JobSpec.from_record(same.spec) == JobSpec.from_record(job.spec)
