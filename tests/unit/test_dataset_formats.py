"""Shards as the field's own readers see them, and byte for byte."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from farm.datasets.formats import FORMATS, check_columns, open_writer, write
from farm.datasets.sample import Sample
from farm.errors import InvalidParameter
from tests.dataset_kit import COLUMNS, dataset, load, members, pixels, prompt, sample, shard

ROOT = Path(__file__).parents[2]
ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three shards in every format."""
    found = tmp_path_factory.mktemp("datasets") / "shapes"
    found.mkdir()
    dataset(found)
    return found


def agrees(row: int, image: Any, told: dict[str, Any]) -> None:
    assert (np.asarray(image) == pixels(row)).all()
    expected = sample(row)
    assert (told["prompt"], told["seed"]) == (prompt(row), 2**62 + row)
    assert (told["loras"], told["clip_skip"], told["strength"]) == ("", 0, 1.0)
    assert {name: told[name] for name in COLUMNS} == expected.columns
    assert told["sha256"] == expected.sha256


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("way", ["whole", "part", "builder"])
def test_datasets_loads_each(
    folder: Path, form: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "whole": ((str(folder),), {"data_dir": form}),
        "part": ((str(folder / form),), {}),
        "builder": ((form,), {"data_files": str(folder / form / "**")}),
    }
    args, kwargs = ways[way]
    found = load(tmp_path, monkeypatch, *args, **kwargs)
    rows = [(one["png"], one["json"]) for one in found] if form == "webdataset" else None
    rows = rows or [(one["image"], one) for one in found]
    assert sorted(told["row"] for _, told in rows) == list(range(ROWS))
    for image, told in rows:
        agrees(told["row"], image, told)
    if form == "webdataset":
        assert [one["txt"] for one in found] == [prompt(row) for row in range(ROWS)]


def test_datasets_loads_the_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load(tmp_path, monkeypatch, str(folder))
    assert found["row"][:] == list(range(ROWS)), "the table, and neither stats nor manifest"
    streamed = load(tmp_path, monkeypatch, str(folder), streaming=True)
    one = next(iter(streamed))
    agrees(0, one["image"], one)


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_webdataset_reads_every_kind_of_picture(form: str, tmp_path: Path) -> None:
    samples = [sample(row, form) for row in range(12)]
    for number in range(3):
        shard(tmp_path, f"train-{number:05d}", samples[number * 4 :][:4], "webdataset")
    rows = members(sorted(tmp_path.glob("webdataset/*.tar")))
    assert [one["__key__"] for one in rows] == [f"{row:08d}" for row in range(12)]
    for row, one in enumerate(rows):
        image = one["jpg" if form == "jpeg" else form]
        shown = np.asarray(Image.open(io.BytesIO(samples[row].data)))
        assert (np.asarray(image) == shown).all()
        assert one["txt"] == one["json"]["prompt"] == prompt(row)


def test_a_tar_is_as_tarfile_writes_it(tmp_path: Path) -> None:
    (file,) = shard(tmp_path, "train-00000", map(sample, range(4)), "webdataset")
    again = io.BytesIO()
    with (
        tarfile.open(file.path) as tar,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
    ):
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")
            copy.addfile(member, tar.extractfile(member))
    assert again.getvalue() == file.path.read_bytes()


def test_a_table_has_one_schema_and_small_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.datasets.formats.parquet.GROUP_BYTES", 2_000)
    plain = [sample(row) for row in range(6)]
    (file,) = shard(tmp_path, "train-00000", plain, "parquet")
    loras = {"loras": [["felt", 0.7], ["ink", -1.0]], "init_image": "inputs/0.png", "strength": 0.5}
    (other,) = shard(tmp_path, "train-00001", [sample(6, "webp", **loras)], "parquet")
    table = pq.ParquetFile(file.path)
    assert table.schema_arrow.equals(pq.read_schema(other.path), check_metadata=True)
    assert table.num_row_groups > 1
    groups = [table.metadata.row_group(n).to_dict()["columns"] for n in range(table.num_row_groups)]
    kinds = {one["path_in_schema"]: one["compression"] for group in groups for one in group}
    assert kinds["image.bytes"] == "UNCOMPRESSED"
    assert kinds["prompt"] == "ZSTD"
    rows = table.read().to_pylist()
    assert [one["image"]["bytes"] for one in rows] == [one.data for one in plain]
    (row,) = pq.read_table(other.path).to_pylist()
    assert (row["image"]["path"], row["loras"]) == ("00000006.webp", "felt:0.7,ink:-1.0")
    assert (row["strength"], row["init_image"]) == (0.5, "inputs/0.png")


def test_an_image_folder_names_its_pictures_first(tmp_path: Path) -> None:
    files = shard(tmp_path, "train-00003", [sample(7), sample(9, "jpeg")], "imagefolder")
    place = tmp_path / "imagefolder/train-00003"
    names = ["00000007.png", "00000009.jpg", "metadata.jsonl"]
    assert sorted(path.name for path in place.iterdir()) == names
    assert [file.key for file in files] == [f"imagefolder/train-00003/{name}" for name in names]
    lines = (place / "metadata.jsonl").read_text("utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [next(iter(row.items())) for row in rows] == [("file_name", name) for name in names[:2]]
    assert [row["prompt"] for row in rows] == [prompt(7), prompt(9)]


def told(files: Any) -> list[tuple[str, int, str]]:
    return [(file.key, file.size, file.sha256) for file in files]


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    here = told(shard(tmp_path / "here", "train-00000", map(sample, range(8))))
    for key, size, digest in here:
        data = (tmp_path / "here" / key).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
    code = (
        "import json, os, sys, pathlib; os.umask(0o077); from tests.dataset_kit import *; "
        "files = shard(pathlib.Path(sys.argv[1]), 'train-00000', map(sample, range(8))); "
        "print(json.dumps([(f.key, f.size, f.sha256) for f in files]))"
    )
    odd = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    there = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        env={**os.environ, **odd}, cwd=tmp_path, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert [tuple(one) for one in json.loads(there.stdout)] == here


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_without_samples_has_no_files(form: str, tmp_path: Path) -> None:
    assert write(form, [], "train-00000", tmp_path, COLUMNS) == []
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_finished_goes(form: str, tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield sample(0)
        raise OSError("no such picture")

    with pytest.raises(OSError, match="no such picture"):
        write(form, broken(), "train-00000", tmp_path, COLUMNS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ValueError, match="row 3 after row 4"):
        write(form, [sample(4), sample(3)], "train-00000", tmp_path, COLUMNS)
    assert len(write(form, [sample(0)], "train-00000", tmp_path, COLUMNS)) in (1, 2)


def test_what_no_reader_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="no format 'zip', there are: webdataset"):
        open_writer("zip", "train-00000", tmp_path)
    check_columns(["style", "Artist_2"])
    for name in ("prompt", "image", "file_name", "mask_file_name", "__key__", "a b", "", "1st"):
        with pytest.raises(InvalidParameter, match="column"):
            check_columns([name])


def test_own_values_become_what_their_column_is(tmp_path: Path) -> None:
    odd = {"style": None, "score": float("nan"), "liked": 1, "take": 3.0, "other": "x"}
    given = sample(0)
    one = Sample(0, given.data, "png", given.sha256, given.params, odd)
    two = Sample(1, given.data, "png", given.sha256, given.params, {"style": "\ud800"})
    files = write("parquet", [one, two], "train-00000", tmp_path, COLUMNS)
    rows = pq.read_table(files[0].path, columns=list(COLUMNS)).to_pylist()
    assert rows[0] == {"style": "", "score": None, "liked": True, "take": 3}
    assert rows[1] == {"style": "?", "score": None, "liked": None, "take": None}
    files = write("imagefolder", [one, two], "train-00000", tmp_path, COLUMNS)
    lines = [json.loads(line) for line in files[-1].path.read_text("utf-8").splitlines()]
    assert [{name: line[name] for name in COLUMNS} for line in lines] == rows


@pytest.mark.parametrize("form", FORMATS)
def test_memory_is_bounded_whatever_the_shard(form: str, tmp_path: Path) -> None:
    code = f"""
import pathlib, resource, sys
from farm.datasets.formats import write
from farm.datasets.sample import Sample
params = {{"model": "m", "prompt": "p", "seed": 1, "width": 8, "height": 8, "steps": 1,
          "guidance_scale": 1.0, "format": "png"}}
base = bytes(1_000_000)
def samples(n):
    for row in range(n):
        yield Sample(row, base + row.to_bytes(8, "big"), "png", "0" * 64, params)
folder = pathlib.Path(sys.argv[1])
write({form!r}, samples(40), "warm", folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write({form!r}, samples(300), "train", folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert int(grown.stdout) < 60_000, "KiB, for 300 MB of pictures"
