"""Datasets in their places: whose one is, verify, publish, diff, also of hostile manifests."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from farm.blobs import BlobStat, BlobStore, open_blobs
from farm.config import Settings
from farm.datasets.diff import diff
from farm.datasets.manifest import Verdict, manifest_of, verify
from farm.datasets.place import open_place, remove, take
from farm.datasets.publish import publish
from farm.datasets.stats import json_bytes, stats_key
from farm.errors import BlobDamaged, FarmError, InvalidConfig, NotFound, StorageRefused
from tests.place_kit import TYPE, dataset, files, picture, put, sha, stats, three


def manifest(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return told


def check(place: BlobStore) -> Verdict:
    return verify(place, "the place")


def copied(source: BlobStore, target: BlobStore) -> dict[str, bool]:
    found: dict[str, bool] = {}
    publish(source, "the source", target, lambda file, new: found.update({file.key: new}))
    return found


# ---- whose a place is


def test_a_place_is_taken_once_and_known_again(tmp_path: Path) -> None:
    place = open_blobs(str(tmp_path / "out"))
    take(place, "mine")
    take(place, "mine")
    with pytest.raises(InvalidConfig, match="named 'mine' lies there"):
        take(place, "yours")
    with pytest.raises(NotFound, match="is not finished"):
        manifest_of(place, "there")


@pytest.mark.parametrize(
    "key",
    ["README.md", "recipe.toml", "croissant.json", "parquet/sales.parquet", "stats/a.json"],
)
def test_what_others_have_there_is_left_alone(tmp_path: Path, key: str) -> None:
    place = open_blobs(str(tmp_path))
    place.put(key, b"precious", TYPE)
    with pytest.raises(InvalidConfig, match=key):
        take(place, "mine")
    with pytest.raises(InvalidConfig, match=key):
        copied(three(tmp_path / "set"), place)
    assert place.get(key) == b"precious"
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"name": []}'])
def test_a_manifest_that_tells_no_name_is_somebody_elses(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(InvalidConfig, match="lies"):
        take(open_blobs(str(tmp_path)), "mine")
    assert (tmp_path / "manifest.json").read_bytes() == data


def test_files_beside_a_dataset_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "pictures").mkdir()
    take(open_blobs(str(tmp_path)), "mine")


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_in_the_way_is_said_at_once(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidConfig, match="file is no directory"):
        open_place(str(tmp_path / "file" / below), Settings(home=tmp_path / "home"))


@pytest.mark.parametrize("where", ["", "a\0b", "s3://", "ftp://a/b", "s3://bucket/A b"])
def test_what_is_no_place_is_said(tmp_path: Path, where: str) -> None:
    with pytest.raises(InvalidConfig):
        open_place(where, Settings(home=tmp_path / "home"))


def test_a_read_only_place_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # root may write anywhere

    place = open_place(str(tmp_path / "out"), Settings(home=tmp_path / "home"))
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StorageRefused, match="read-only"):
        take(place, "mine")


def test_only_its_own_is_ever_removed(tmp_path: Path) -> None:
    place = three(tmp_path)
    for name in ("notes.txt", "pictures/a.png"):
        place.put(name, b"mine", TYPE)
    remove(place, lambda key: True)
    assert set(files(tmp_path)) == {"README.md", "manifest.json", "notes.txt", "pictures/a.png"}


# ---- verify


def test_a_whole_dataset_is_all_right(tmp_path: Path) -> None:
    found = check(three(tmp_path))
    assert (found.wrong, found.extra, found.rows, found.shards) == ([], [], 3, 3)
    assert found.files == len(files(tmp_path)) - 1
    assert found.bytes == sum(map(len, files(tmp_path).values())) - len(
        (tmp_path / "manifest.json").read_bytes()
    )


@pytest.mark.parametrize("key", ["README.md", "stats/00001.json", "webdataset/train-00000.tar"])
def test_one_byte_or_one_file_is_noticed(tmp_path: Path, key: str) -> None:
    place = three(tmp_path)
    data = bytearray(place.get(key))
    data[len(data) // 2] ^= 1
    place.put(key, bytes(data), TYPE)
    found = check(place)
    assert found.wrong == [{"key": key, "fault": "is not what was written"}]
    assert not found.extra
    place.delete([key])
    assert check(place).wrong == [{"key": key, "fault": "is missing"}]


def test_what_belongs_to_no_shard_is_told(tmp_path: Path) -> None:
    place = three(tmp_path)
    place.put("imagefolder/train-00000/00000000.png", b"x", TYPE)
    found = check(place)
    assert found.extra == ["imagefolder/train-00000/00000000.png"]
    assert not found.wrong


class Wide:
    """A place of so many shards, 100 empty pictures each, in no memory to speak of."""

    def __init__(self, shards: int) -> None:
        self.files = 100 * shards
        told = [
            {"stats": {"key": stats_key(n), "sha256": sha(_wide(n)), "size": 1}, "files": []}
            for n in range(shards)
        ]
        self._manifest = json_bytes(
            {"name": "wide", "batch": "b", "rows": self.files, "counts": {}, "shards": told,
             "files": []}
        )  # fmt: skip

    def chunks(self, key: str) -> Iterator[bytes]:
        if key == "manifest.json":
            yield self._manifest
        elif key.startswith("stats/"):
            yield _wide(int(key[6:11]))

    def list(self, prefix: str) -> Iterator[BlobStat]:
        if prefix == "imagefolder/":
            for row in range(self.files + 1):
                yield BlobStat(f"imagefolder/train-{row // 100:05d}/{row:07d}.png", 0)


def _wide(number: int) -> bytes:
    rows = range(100 * number, 100 * number + 100)
    keys = [f"imagefolder/train-{number:05d}/{row:07d}.png" for row in rows]
    told = [{"key": key, "sha256": sha(""), "size": 0} for key in keys]
    return stats(number, [picture(row, sha(str(row))) for row in rows], told)


def test_a_wide_dataset_takes_no_memory_a_file_but_a_mark() -> None:
    def peak(do: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            do()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = (cast(BlobStore, Wide(shards)) for shards in (2, 10))
    found = check(many)
    assert (found.files, found.wrong) == (1_010, [])
    assert found.extra == ["imagefolder/train-00010/0001000.png"]
    for do in (check, lambda place: diff(place, "a", place, "b")):
        peaks = [peak(lambda: do(place)) for place in (few, many)]  # noqa: B023
        assert peaks[1] - peaks[0] < 800 * 200, "bytes"


def _changed(told: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *way, last = path.split(".")
    here: Any = told
    for step in way:
        here = here[int(step) if isinstance(here, list) else step]
    here[int(last) if isinstance(here, list) else last] = value
    return told


HOSTILE = [
    ("files.0.key", "../outside"), ("files.0.key", "/etc/passwd"),
    ("files.0.key", "notes.txt"), ("files.0.key", "stats/../a"), ("files.0.key", "a/../../b"),
    ("files.0.key", 5), ("files.0.key", "x" * 5_000), ("files.0.sha256", None),
    ("files.0.sha256", "0"), ("files.0.size", -1), ("files.0.size", 10**300),
    ("files.0.size", "many"), ("files", None), ("files", "x"), ("files", [[]]), ("shards", None),
    ("shards", {}), ("shards", [1]), ("shards.0", {}), ("shards.0.stats", "stats/00000.json"),
    ("shards.0.stats.key", "../outside"), ("shards.0.files", [{"key": "../outside"}]),
    ("name", None), ("name", {}), ("rows", "x"), ("rows", -1), ("rows", 1e400), ("counts", []),
    ("counts", {"accepted": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=str)
def test_a_hostile_manifest_is_an_error_in_words(tmp_path: Path, path: str, value: Any) -> None:
    place = three(tmp_path / "set")
    (tmp_path / "outside").write_text("secret")
    told = _changed(manifest(tmp_path / "set"), path, value)
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(told))
    before = files(tmp_path)
    for way in (
        lambda: check(place),
        lambda: copied(place, open_blobs(str(tmp_path / "copy"))),
        lambda: diff(place, "a", place, "b"),
    ):
        with pytest.raises(BlobDamaged, match=r"manifest\.json is none that a run writes") as error:
            way()
        assert len(error.value.message) < 400
    assert files(tmp_path) == before


@pytest.mark.parametrize("key", ["../../outside", 7, "manifest.json/"])
def test_hostile_stats_lead_nowhere(tmp_path: Path, key: Any) -> None:
    place = three(tmp_path / "set")
    (tmp_path / "outside").write_text("secret")
    stats = json.loads(place.get("stats/00000.json"))
    stats["files"] = [{"key": key, "sha256": sha(b"secret"), "size": 6}]
    told = manifest(tmp_path / "set")
    told["shards"][0]["stats"] = put(place, "stats/00000.json", json_bytes(stats))
    place.put("manifest.json", json_bytes(told), TYPE)
    check(place)  # the manifest itself tells of the shard's tar
    for way in (
        lambda: copied(place, open_blobs(str(tmp_path / "copy"))),
        lambda: diff(place, "a", place, "b"),
    ):
        with pytest.raises(BlobDamaged, match=r"stats/00000\.json is not what was written"):
            way()
    assert "outside" not in {path.name for path in (tmp_path / "copy").rglob("*")}


def test_a_link_out_of_the_place_is_not_followed(tmp_path: Path) -> None:
    place = three(tmp_path / "set")
    (tmp_path / "outside").write_bytes(b"# card")
    (tmp_path / "set" / "README.md").unlink()
    (tmp_path / "set" / "README.md").symlink_to(tmp_path / "outside")
    for way in (lambda: check(place), lambda: copied(place, open_blobs(str(tmp_path / "copy")))):
        with pytest.raises(FarmError, match="symbolic link"):
            way()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}'])
def test_no_manifest_is_no_dataset(tmp_path: Path, data: bytes) -> None:
    place = three(tmp_path)
    place.put("manifest.json", data, TYPE)
    with pytest.raises(NotFound, match=r"holds no dataset|is not finished"):
        check(place)


# ---- publish


def test_a_dataset_is_copied_and_gone_on_with(tmp_path: Path) -> None:
    source, target = three(tmp_path / "set"), open_blobs(str(tmp_path / "copy"))
    first = copied(source, target)
    assert all(first.values())
    assert files(tmp_path / "copy") == files(tmp_path / "set")
    target.delete(["stats/00001.json"])
    again = copied(source, target)
    assert [key for key, new in again.items() if new] == ["stats/00001.json"]
    assert files(tmp_path / "copy") == files(tmp_path / "set")
    assert not any(copied(source, source).values())


def test_a_copy_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    source, target = three(tmp_path / "set"), open_blobs(str(tmp_path / "copy"))

    def killed(file: Any, new: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(source, "the source", target, killed)
    with pytest.raises(NotFound):
        check(target)
    copied(source, target)
    assert files(tmp_path / "copy") == files(tmp_path / "set")


def test_what_an_earlier_version_had_goes(tmp_path: Path) -> None:
    target = open_blobs(str(tmp_path / "copy"))
    copied(three(tmp_path / "three"), target)
    copied(dataset(tmp_path / "one", [picture(0, "a")]), target)
    assert files(tmp_path / "copy") == files(tmp_path / "one")


def test_another_dataset_is_not_written_over(tmp_path: Path) -> None:
    target = dataset(tmp_path / "other", [picture(0, "x")], name="other")
    before = files(tmp_path / "other")
    with pytest.raises(InvalidConfig, match="named 'other'"):
        copied(three(tmp_path / "set"), target)
    assert files(tmp_path / "other") == before


@pytest.mark.parametrize("key", ["README.md", "webdataset/train-00000.tar", "stats/00000.json"])
def test_what_is_damaged_is_not_published(tmp_path: Path, key: str) -> None:
    source, target = three(tmp_path / "set"), open_blobs(str(tmp_path / "copy"))
    copied(source, target)
    source.put(key, b"changed", TYPE)
    with pytest.raises(BlobDamaged, match="is not what was written"):
        copied(source, open_blobs(str(tmp_path / "new")))
    with pytest.raises(NotFound):
        check(open_blobs(str(tmp_path / "new")))
    assert not check(target).wrong


# ---- diff


def test_rows_are_told_apart_by_job_and_by_picture(tmp_path: Path) -> None:
    old = [picture(0, "same"), picture(1, "changed", "x"), picture(2, "gone"), picture(3, "twice")]
    new = [picture(9, "same"), picture(8, "changed", "y"), picture(3, "twice"), picture(4, "twice")]
    found = diff(dataset(tmp_path / "a", old), "a", dataset(tmp_path / "b", new[:2], new[2:]), "b")
    assert (found.same, found.changed, found.added, found.removed) == (2, 1, 1, 1)
    assert found.rows == {"changed": [8], "added": [4], "removed": [2]}
    assert found.as_dict()["same"] == 2


def test_a_dataset_is_like_itself(tmp_path: Path) -> None:
    place = three(tmp_path)
    found = diff(place, "a", place, "b")
    assert (found.same, found.changed, found.added, found.removed) == (3, 0, 0, 0)
    with pytest.raises(NotFound):
        diff(open_blobs(str(tmp_path / "none")), "none", place, "b")
