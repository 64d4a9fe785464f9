"""What lies inside a stored picture, and what a download leaves behind."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farm.blobs import open_blobs
from farm.errors import BlobDamaged, BlobNotFound
from farm.pictures import CONTENT_TYPES, Origin, encode, object_key, parameters, sha256
from farm.results import contact_sheet, download, fetch
from farm.spec import MAX_LORAS, MAX_PROMPT_CHARS
from farm.store.ids import JobRef
from farm.store.reads import Job
from tests.store_kit import spec

ORIGIN = Origin("diffusers", "ab" * 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
PROMPT = "赤い円 on a Ñandú 🟥, <b>bold</b>"


@pytest.mark.parametrize("form", CONTENT_TYPES)
def test_the_file_holds_parameters_and_mark(form: str) -> None:
    job = spec(PROMPT, format=form, negative_prompt="dull", scheduler="euler_a", seed=7)
    data = encode(PIXELS.tobytes(), job, ORIGIN)
    assert data == encode(PIXELS.tobytes(), job, ORIGIN)
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.get_format_mimetype() == CONTENT_TYPES[form]
    if form == "png":
        text = image.info["parameters"]
        assert (np.asarray(image) == PIXELS).all()
    else:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        text = comment[8:].decode("utf-16-be")
    assert text == parameters(job, ORIGIN)
    assert text.splitlines()[:2] == [PROMPT, "Negative prompt: dull"]
    assert "Steps: 4, Sampler: euler_a, CFG scale: 4, Seed: 7, Size: 64x64" in text
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in data


@pytest.mark.parametrize("form", CONTENT_TYPES)
def test_the_longest_texts_with_all_loras_can_be_encoded(form: str) -> None:
    loras = {f"{n}-{'long' * 15}": 0.5 for n in range(MAX_LORAS)}
    longest = "🟥" * MAX_PROMPT_CHARS
    job = spec(longest, format=form, negative_prompt=longest, loras=loras)
    origin = replace(ORIGIN, loras=dict.fromkeys(loras, "cd" * 32))
    image = Image.open(io.BytesIO(encode(PIXELS.tobytes(), job, origin)))
    image.load()
    if form != "png":
        text = image.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
        assert text.startswith(f"{longest}\nNegative prompt: 🟥")
        assert "Lora hashes: " in text


def test_what_a_job_has_beside_its_texts_stands_in_the_parameters() -> None:
    plain = spec(PROMPT, negative_prompt="dull")
    job = plain.model_copy(
        update={"strength": 0.55, "clip_skip": 1, "loras": (("felt", 0.7), ("ink", -1.0))}
    )
    text = parameters(job, Origin("fake", "ab" * 32, {"felt": "cd" * 32, "ink": "ef" * 32}))
    assert text.splitlines()[:2] == [PROMPT, "Negative prompt: dull"], "no tag in the prompt"
    # the pattern by which A1111 reads them: modules/infotext_utils.py
    pairs = re.findall(
        r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1]
    )
    found = dict(pairs)
    assert found["Denoising strength"] == "0.55"
    assert found["Clip skip"] == "2"
    assert json.loads(found["Loras"]) == "<lora:felt:0.7> <lora:ink:-1>"
    assert json.loads(found["Lora hashes"]) == "felt: cdcdcdcdcd, ink: efefefefef"
    assert (found["Model"], found["Version"]) == ("shapes", "renderfarm")
    for name in ("Denoising", "Clip skip", "Lora"):
        assert name not in parameters(plain, ORIGIN)


def test_keys_differ_by_claim_and_hold_nothing_from_a_prompt() -> None:
    one, two = (object_key(JobRef("0abc", 17), n, "5e" * 16, "jpeg") for n in (1, 2))
    assert one == "pictures/0abc/0000017-1-5e5e5e5e.jpg"
    assert one != two


def job(idx: int, data: bytes, key: str) -> Job:
    return Job(
        id=f"0abc/{idx}", batch_id="0abc", idx=idx, spec=spec(PROMPT).model_dump(),
        state="succeeded", failures=0, claim_no=1, engine="fake", progress=1.0, started_at=0.0,
        finished_at=1.0, object_key=key, sha256=sha256(data), size_bytes=len(data), render_s=0.1,
        fingerprint="f" * 64, error_code=None, error=None,
    )  # fmt: skip


def test_download_is_whole_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    blobs = open_blobs((tmp_path / "blobs").as_uri())
    jobs = []
    for idx in range(5):
        data = encode(PIXELS.tobytes(), spec(PROMPT, seed=idx), ORIGIN)
        key = object_key(JobRef("0abc", idx), 1, "5e" * 16, "png")
        blobs.put(key, data, "image/png")
        jobs.append(job(idx, data, key))
    read = partial(fetch, blobs)
    out, seen = tmp_path / "out", list[Path]()
    assert download(read, jobs, out, seen.append) == len(seen) == 5
    (out / "0abc-0000001.png").write_bytes(b"cut")
    blobs.delete([j.object_key for j in jobs if j.idx != 1 and j.object_key])
    assert download(read, jobs, out) == 5, "only the damaged one is fetched again"
    names = [f"0abc-000000{i}.png" for i in range(5)]
    assert sorted(p.name for p in out.iterdir()) == [*names, "0abc.jsonl"]
    rows = [json.loads(line) for line in (out / "0abc.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPT] * 5
    with pytest.raises(BlobNotFound):
        fetch(blobs, jobs[0])
    (out / "0abc-0000000.png").unlink()
    (out / "0abc.jsonl").unlink()
    with pytest.raises(BlobNotFound, match=r"1 pictures are missing.*0000000-1"):
        download(read, jobs, out)
    assert len((out / "0abc.jsonl").read_text("utf-8").splitlines()) == 4, "the others are there"
    with pytest.raises(BlobDamaged, match="not the picture"):
        fetch(blobs, replace(jobs[1], sha256="0" * 64))
    assert contact_sheet(blobs, iter(jobs[1:2]), tmp_path / "sheet.png") == 1
    assert contact_sheet(blobs, iter([]), tmp_path / "none.png") == 0
