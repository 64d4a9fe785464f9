"""What every blob store does alike: a local directory and a real S3 server."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from farm.blobs import (
    MAX_EXPIRES_S,
    PIECE,
    BlobStat,
    BlobStore,
    S3Options,
    check_key,
    check_prefix,
    open_blobs,
)
from farm.errors import BlobNotFound, InvalidConfig

HOSTILE = {
    "empty": "",
    "absolute": "/etc/passwd",
    "parent": "../secret",
    "parent inside": "a/../../secret",
    "dot": "a/./b",
    "empty segment": "a//b",
    "trailing slash": "a/",
    "hidden": ".tmp-1",
    "NUL": "a\0b",
    "newline": "a\n",
    "backslash": "a\\..\\b",
    "drive": "c:/x",
    "percent": "a%2f..%2fb",
    "space": "a b",
    "capital": "A/b",
    "umlaut": "bücher/1",
    "dash first": "-rf",
    "trailing dot": "a./b",
    "card as a directory": "README.md/a",
    "another readme": "README.txt",
    "card in other letters": "a/Readme.md",
    "device": "a/con",
    "device with extension": "nul.png",
    "5000 characters": "a" * 5000,
    "513 characters": "a/" * 256 + "b",
    "segment of 256": "a" * 256,
}


def keys(store: BlobStore, prefix: str = "") -> list[str]:
    return [found.key for found in store.list(prefix)]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refuses(action: Callable[[str], object], key: str) -> bool:
    try:
        action(key)
    except ValueError:
        return True
    return False


def test_round_trip_keeps_every_byte(blob_store: BlobStore) -> None:
    data = bytes(range(256)) * 3
    blob_store.put("a/b=1/c_d-e.png", data, "image/png")
    assert blob_store.get("a/b=1/c_d-e.png") == data
    assert blob_store.stat("a/b=1/c_d-e.png") == BlobStat("a/b=1/c_d-e.png", 768)


def test_an_object_may_be_empty(blob_store: BlobStore) -> None:
    blob_store.put("empty", b"", "text/plain")
    assert blob_store.get("empty") == b""
    assert blob_store.stat("empty") == BlobStat("empty", 0)


def test_put_replaces(blob_store: BlobStore) -> None:
    blob_store.put("a", b"a longer first value", "text/plain")
    blob_store.put("a", b"second", "text/plain")
    assert blob_store.get("a") == b"second"
    assert list(blob_store.list()) == [BlobStat("a", 6)]


def test_eight_megabytes(blob_store: BlobStore) -> None:
    data = b"0123456789abcdef" * (8 * 2**20 // 16)
    blob_store.put("big", data, "application/octet-stream")
    assert blob_store.get("big") == data


def test_a_file_in_parts_comes_back_piece_by_piece(blob_store: BlobStore, tmp_path: Path) -> None:
    size = 20 * 2**20 + 3
    path = written(tmp_path / "shard", random.Random(1).randbytes(size))
    tracemalloc.start()
    blob_store.put_files([("a/shard.tar", path, "application/x-tar")])
    digest, pieces = hashlib.sha256(), []
    for piece in blob_store.chunks("a/shard.tar"):
        digest.update(piece)
        pieces.append(len(piece))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()
    assert pieces == [PIECE] * 20 + [3]
    assert list(blob_store.list()) == [BlobStat("a/shard.tar", size)]
    assert blob_store.stat("a/shard.tar") == BlobStat("a/shard.tar", size)
    blob_store.delete(["a/shard.tar"])
    assert blob_store.stat("a/shard.tar") is None


def test_a_file_replaces_and_stays_the_callers(blob_store: BlobStore, tmp_path: Path) -> None:
    path = written(tmp_path / "file", b"from a file")
    blob_store.put("a", b"a longer first value", "text/plain")
    blob_store.put_files([("a", path, "text/plain")])
    path.write_bytes(b"written on by its owner")
    assert blob_store.get("a") == b"from a file"
    blob_store.put_files([("a", written(path, b""), "text/plain")])
    assert blob_store.stat("a") == BlobStat("a", 0)
    assert list(blob_store.chunks("a")) == []
    assert keys(blob_store) == ["a"]


def test_a_file_made_aside(blob_store: BlobStore) -> None:
    blob_store.put("a/b", b"old", "text/plain")
    with blob_store.aside() as folder:
        (folder / "deep").mkdir()
        blob_store.put_files([("a/b", written(folder / "deep/file", b"new"), "text/plain")])
        written(folder / "left", b"never put")
        assert keys(blob_store) == ["a/b"]
    assert blob_store.get("a/b") == b"new"
    assert not folder.exists()
    with blob_store.aside() as other:
        assert other != folder


def test_a_file_that_is_not_there_stores_nothing(blob_store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        blob_store.put_files([("a", tmp_path / "nope", "text/plain")])
    with pytest.raises(IsADirectoryError):
        blob_store.put_files([("a", tmp_path, "text/plain")])
    assert keys(blob_store) == []


def test_pieces_may_be_small_and_left(blob_store: BlobStore) -> None:
    blob_store.put("a", b"0123456789", "text/plain")
    assert list(blob_store.chunks("a", 4)) == [b"0123", b"4567", b"89"]
    assert next(blob_store.chunks("a", 4)) == b"0123"


def test_a_card_may_have_the_name_that_the_hub_gives_it(blob_store: BlobStore) -> None:
    for key in ("README.md", "a/README.md", "a.txt"):
        blob_store.put(key, key.encode(), "text/markdown")
    assert blob_store.get("a/README.md") == b"a/README.md"
    assert keys(blob_store) == ["README.md", "a.txt", "a/README.md"]
    assert keys(blob_store, "README.md") == ["README.md"]


def test_longest_keys(blob_store: BlobStore) -> None:
    longest = "/".join(["a" * 255, "b" * 255, "c"]).removesuffix("/c")
    blob_store.put(longest, b"x", "text/plain")
    assert keys(blob_store) == [longest]


def test_hostile_keys_are_refused_everywhere(blob_store: BlobStore) -> None:
    for name, key in HOSTILE.items():
        for action in (
            lambda key: blob_store.put(key, b"x", "text/plain"),
            lambda key: blob_store.put_files([(key, Path(__file__), "text/plain")]),
            blob_store.get,
            blob_store.chunks,
            blob_store.stat,
            blob_store.url,
            lambda key: blob_store.delete(["fine", key]),
        ):
            assert refuses(action, key), name


def test_hostile_prefixes_are_refused_before_the_first_item(blob_store: BlobStore) -> None:
    for prefix in ("/", "../", "a//", ".", "a/.", "A", "a\0", "a" * 5000):
        with pytest.raises(ValueError):
            blob_store.list(prefix)


def test_what_is_missing(blob_store: BlobStore) -> None:
    blob_store.put("a/b", b"x", "text/plain")
    for key in ("nope", "a", "a/c", "a/b/c"):
        with pytest.raises(BlobNotFound, match=key):
            blob_store.get(key)
        pieces = blob_store.chunks(key)
        with pytest.raises(BlobNotFound, match=key):
            next(pieces)
        assert blob_store.stat(key) is None
    blob_store.delete(["nope", "a", "a/c", "a/b/c"])
    blob_store.delete(["nope"])
    blob_store.delete([])
    assert keys(blob_store) == ["a/b"]


def test_delete_takes_any_iterable_and_only_what_it_names(blob_store: BlobStore) -> None:
    for key in ("a/1", "a/2", "a/3", "b"):
        blob_store.put(key, b"x", "text/plain")
    blob_store.delete(f"a/{n}" for n in (1, 2))
    assert keys(blob_store) == ["a/3", "b"]


def test_a_bad_key_among_good_ones_deletes_nothing(blob_store: BlobStore) -> None:
    blob_store.put("a", b"x", "text/plain")
    with pytest.raises(ValueError):
        blob_store.delete(["a", "../a"])
    assert keys(blob_store) == ["a"]


def test_list_is_sorted_by_key_and_cut_by_prefix(blob_store: BlobStore) -> None:
    stored = ["a-b", "a.b", "a/b", "a/b-c", "a/c/d", "a/c.d", "a0", "a=b", "a_b", "b/a", "c"]
    for key in reversed(stored):
        blob_store.put(key, key.encode(), "text/plain")
    assert list(blob_store.list()) == [BlobStat(key, len(key)) for key in sorted(stored)]
    for prefix in ("a", "a/", "a/b", "a/c", "a/c/", "a/c/d", "a/c/de", "b/", "c", "d", "a-"):
        assert keys(blob_store, prefix) == sorted(k for k in stored if k.startswith(prefix))


def test_listing_what_is_empty(blob_store: BlobStore) -> None:
    assert keys(blob_store) == []
    assert keys(blob_store, "a/b") == []


def test_readers_see_one_whole_value_of_eight_racing_writers(blob_store: BlobStore) -> None:
    values = [bytes([n]) * 200_000 for n in range(8)]
    blob_store.put("a/race", values[0], "application/octet-stream")
    done = Event()

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(blob_store.get("a/race"))
        return seen

    with ThreadPoolExecutor(9) as pool:
        reader = pool.submit(read)
        try:
            for _ in range(2):
                writes = [pool.submit(blob_store.put, "a/race", v, "image/png") for v in values]
                for write in writes:
                    write.result()
        finally:
            done.set()
        assert reader.result() <= set(values)
    assert blob_store.get("a/race") in values
    assert keys(blob_store) == ["a/race"]


def test_eight_threads_share_one_store(blob_store: BlobStore) -> None:
    def work(n: int) -> bytes:
        blob_store.put(f"t/{n}", str(n).encode(), "text/plain")
        return blob_store.get(f"t/{n}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [str(n).encode() for n in range(24)]
    assert len(keys(blob_store, "t/")) == 24


def test_a_link_lives_from_a_second_to_a_week(blob_store: BlobStore) -> None:
    for expires_s in (0, -1, MAX_EXPIRES_S + 1):
        with pytest.raises(ValueError):
            blob_store.url("a", expires_s=expires_s)
    assert blob_store.url("a", expires_s=MAX_EXPIRES_S)


def test_check_leaves_nothing_behind(blob_store: BlobStore) -> None:
    blob_store.check()
    assert keys(blob_store) == []


def test_close_may_be_called_twice(blob_store: BlobStore) -> None:
    blob_store.close()
    blob_store.close()


def test_keys_and_prefixes_that_are_fine() -> None:
    for key in ("a", "0", "2026-11-20/ab/ab12.png", "a=b", "console", "com", "a" * 255):
        assert check_key(key) == key
        assert check_prefix(key) == key
    assert check_prefix("") == ""
    assert check_prefix("a/") == "a/"


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3://ab/../x", "s3://key:secret@host/b", "http://host/b", "file://b", "", "a\0b"],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        open_blobs(url)
    assert "secret" not in caught.value.message


def test_directory_urls(tmp_path: Path) -> None:
    directory = tmp_path / "with space and #?%"
    for url in (directory.as_uri(), str(directory)):
        store = open_blobs(url)
        store.put(f"k{len(url)}", b"x", "text/plain")
    assert len(list(directory.iterdir())) == 2


@pytest.mark.parametrize(
    "facts",
    [
        {"access_key": "a"},
        {"secret_key": "hush"},
        {"endpoint_url": "host:9000"},
        {"endpoint_url": "http://key:hush@host"},
        {"ca_bundle": "/nowhere/ca.pem"},
    ],
)
def test_s3_options_that_cannot_work(facts: dict[str, str]) -> None:
    with pytest.raises(InvalidConfig) as caught:
        S3Options(**facts)  # type: ignore[arg-type]
    assert "hush" not in caught.value.message


def test_a_local_store_needs_no_boto3() -> None:
    code = (
        "import sys, farm.blobs; farm.blobs.open_blobs('/tmp/x'); "
        "sys.exit(any(name.startswith('boto') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
