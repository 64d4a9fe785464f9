"""What only a local directory can do wrong: links, crashes, full and read-only disks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.blobs import BlobStore, S3Options, check_key, local, open_blobs
from farm.blobs.aside import OLD_S, aside
from farm.blobs.local import LocalBlobs
from farm.errors import StorageRefused, StorageUnavailable
from tests.servers import poll


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def store(root: Path) -> BlobStore:
    return open_blobs(str(root))


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def raising(number: int) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_url_is_a_file_uri(store: BlobStore) -> None:
    store.put("a/b=1.png", b"picture", "image/png")
    with urlopen(store.url("a/b=1.png")) as reply:
        assert reply.read() == b"picture"


def test_opening_touches_nothing(store: BlobStore, root: Path) -> None:
    assert list(store.list()) == []
    assert not root.exists()


@pytest.mark.parametrize("link", ["out", "out/file"])
def test_links_out_of_the_root_are_refused(
    store: BlobStore, root: Path, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"not yours")
    root.mkdir()
    (root / "out").symlink_to(outside if "/" in link else outside / "file")
    for action in (
        lambda: store.put(link, b"x", "text/plain"),
        lambda: store.get(link),
        lambda: store.chunks(link),
        lambda: store.stat(link),
        lambda: store.delete([link]),
        lambda: store.url(link),
    ):
        with pytest.raises(StorageUnavailable, match="symbolic link"):
            action()
    assert list(store.list()) == []
    assert (outside / "file").read_bytes() == b"not yours"


def test_a_loop_of_links_is_refused(store: BlobStore, root: Path) -> None:
    root.mkdir()
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    with pytest.raises(StorageUnavailable):
        store.get("a/c")


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "blobs").symlink_to(tmp_path / "disk")
    store = open_blobs(str(tmp_path / "blobs"))
    store.put("a/b", b"x", "text/plain")
    assert [found.key for found in store.list()] == ["a/b"]


def test_a_crash_before_the_replace_leaves_no_object(store: BlobStore, root: Path) -> None:
    store.put("a/old", b"old", "text/plain")
    code = (
        "import os, sys; from farm.blobs import open_blobs; os.replace = lambda *a: os._exit(9); "
        "open_blobs(sys.argv[1]).put(sys.argv[2], b'new', 'text/plain')"
    )
    for key in ("a/old", "a/new"):
        assert subprocess.run([sys.executable, "-c", code, str(root), key]).returncode == 9
    assert len(files(root)) == 3  # two of them are what the crashes left
    assert [found.key for found in store.list()] == ["a/old"]
    assert store.get("a/old") == b"old"
    assert store.stat("a/new") is None


@pytest.mark.parametrize("call", ["write", "replace", "fsync"])
@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EIO, "error")]
)
def test_a_failed_write_names_the_cause_and_leaves_the_old_object(
    store: BlobStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    words: str,
) -> None:
    store.put("a", b"old", "text/plain")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raising(number))
        with pytest.raises(StorageUnavailable, match=words) as caught:
            store.put("a", b"new", "text/plain")
    assert str(root) in caught.value.message
    assert not isinstance(caught.value, StorageRefused), "nobody can write there"
    assert store.get("a") == b"old"
    assert files(root) == ["a"]


def test_a_file_is_stored_whole_or_not_at_all(
    store: BlobStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789" * 2**18)
    store.put("a", b"old", "text/plain")
    write, written = os.write, 0

    def fill_up(descriptor: int, data: bytes) -> int:
        nonlocal written
        if written > 2**20:
            raising(errno.ENOSPC)()
        written += write(descriptor, data)
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill_up)
        with pytest.raises(StorageUnavailable, match="full"):
            store.put_files([("a", tmp_path / "file", "text/plain")])
    assert written > 2**20
    assert store.get("a") == b"old"
    assert files(root) == ["a"]


def test_a_file_made_aside_is_moved(store: BlobStore, root: Path) -> None:
    with store.aside() as folder:
        path = folder / "shard"
        path.write_bytes(b"0123456789")
        number = path.stat().st_ino
        store.put_files([("a/shard", path, "text/plain")])
        assert not path.exists()
    assert (root / "a/shard").stat().st_ino == number
    assert files(root) == ["shard"]


def test_a_disk_that_is_full_while_a_file_is_made_aside(store: BlobStore) -> None:
    with pytest.raises(StorageUnavailable, match="full"), store.aside():
        raising(errno.ENOSPC)()


KILLED = """
import sys, time
from pathlib import Path
from farm.blobs.aside import aside
with aside(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "shard").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_what_the_killed_left_aside_goes_with_the_next(
    kind: str, store: BlobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while whoever made it lives."""
    root.mkdir()
    if kind == "s3":
        monkeypatch.setattr("tempfile.tempdir", str(root))
        store = open_blobs("s3://bucket", s3=S3Options(region="eu-west-1"))
    prefix = ".tmp-aside-" if kind == "local" else "farm-aside-"
    other = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root), prefix], stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout
        left = Path(other.stdout.readline().strip())
        with store.aside() as mine:
            assert left.is_dir()
            other.kill()
            other.wait()
            with store.aside():
                assert not left.exists()
            assert mine.is_dir()
    assert list(root.iterdir()) == []


def test_where_no_lock_tells_age_does(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, others = (root / f".tmp-aside-{name}" for name in ("old", "new", "others"))
    for folder in (old, new, others):
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(b"half")
    (root / ".tmp-aside-file").write_bytes(b"no folder")
    (root / ".tmp-aside-link").symlink_to(others)
    (others / ".lock").touch()
    past = time.time() - OLD_S - 60
    os.utime(old, (past, past))
    os.utime(root / ".tmp-aside-file", (past, past))
    with aside(root, ".tmp-aside-"):
        assert [one.exists() for one in (old, new, others)] == [False, True, True]
    os.utime(others, (past, past))
    with (others / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with aside(root, ".tmp-aside-"):
            assert others.exists(), "its lock is seen here"
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    with aside(root, ".tmp-aside-") as mine, aside(root, ".tmp-aside-"):
        assert mine.exists()
        assert not others.exists()
    assert {one.name for one in root.iterdir()} == {
        ".tmp-aside-new", ".tmp-aside-file", ".tmp-aside-link",
    }  # fmt: skip


def test_a_folder_that_was_taken_for_left_over_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process came between its making and its lock."""
    root.mkdir()
    flock, taken = fcntl.flock, []

    def too_late(descriptor: int, how: int) -> None:
        if not taken:
            [folder] = root.iterdir()
            taken.append(folder)
            shutil.rmtree(folder)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with aside(root, ".tmp-aside-") as folder:
        assert folder.is_dir()
        assert folder not in taken


def test_many_aside_at_once_leave_each_other_alone(store: BlobStore, root: Path) -> None:
    def use(number: int) -> bytes:
        with store.aside() as folder:
            (folder / "file").write_bytes(b"%d" % number)
            store.put_files([(f"a/{number}", folder / "file", "text/plain")])
        return store.get(f"a/{number}")

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(use, range(200))) == [b"%d" % number for number in range(200)]
    assert [one.name for one in root.iterdir()] == ["a"]


def test_a_disk_that_breaks_while_it_is_read(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"0123456789", "text/plain")
    pieces = store.chunks("a", 4)
    assert next(pieces) == b"0123"
    with pytest.raises(StorageUnavailable, match="cannot read a"):
        pieces.throw(OSError(errno.EIO, "broken"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_check_on_a_read_only_directory_says_so(
    store: BlobStore, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raising(number))
        with pytest.raises(StorageRefused, match=r"read-only.*make it writable") as caught:
            store.check()
    assert str(root) in caught.value.message


def test_check_on_a_directory_without_rights(root: Path) -> None:
    root.mkdir(mode=0o500)
    nowhere = Path("/sys/kernel") if os.geteuid() == 0 else root  # root may write to any other
    with pytest.raises(StorageRefused, match="read-only"):
        open_blobs(str(nowhere)).check()


def test_check_on_a_full_disk_says_so(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", raising(errno.ENOSPC))
        with pytest.raises(StorageUnavailable, match="full"):
            store.check()


def test_short_writes_are_carried_on(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
        store.put("a", b"0123456789" * 450, "text/plain")
    assert store.get("a") == b"0123456789" * 450


def test_a_file_where_a_directory_must_be(store: BlobStore) -> None:
    store.put("a/b", b"x", "text/plain")
    for key in ("a", "a/b/c"):
        with pytest.raises(StorageUnavailable, match="same name"):
            store.put(key, b"x", "text/plain")


def test_a_file_where_the_root_must_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageUnavailable, match="file is a file, not a directory"):
        LocalBlobs(tmp_path / "file").put("a", b"x", "text/plain")


def test_files_that_are_no_objects_are_not_listed(store: BlobStore, root: Path) -> None:
    store.put("a", b"x", "text/plain")
    for name in (".tmp-1", "README", "lost+found", ".DS_Store", "README.md/a"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    assert [found.key for found in store.list()] == ["a"]


@given(st.text(max_size=40) | st.from_regex(r"[a-z./\\.:=-]{1,40}", fullmatch=True))
def test_every_key_is_refused_or_stays_inside(text: str) -> None:
    try:
        key = check_key(text)
    except ValueError:
        return
    inside = os.path.normpath(f"/root/{key}")
    assert inside == f"/root/{key}"


def test_threads_share_the_sync_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Semaphore(0), threading.Semaphore(0)
    seen: list[set[str]] = []

    def sync(directory: Path) -> None:
        seen.append({path.name for path in directory.iterdir()})  # what this sync makes last
        begun.release()
        assert gate.acquire(timeout=10)

    store = LocalBlobs(tmp_path)
    store.put("a/first.png", b"1", "image/png")
    monkeypatch.setattr(local, "_sync_directory", sync)
    with ThreadPoolExecutor(9) as pool:
        leader = pool.submit(store.put, "a/leader.png", b"2", "image/png")
        assert begun.acquire(timeout=10)
        others = [pool.submit(store.put, f"a/{i}.png", b"3", "image/png") for i in range(8)]
        poll(lambda: len(list(tmp_path.glob("a/[0-7].png"))) == 8, "the others' files", 10)
        poll(lambda: bool(store._syncs._next), "the others' wait", 10)
        assert not any(other.done() for other in others)
        gate.release()
        leader.result(10)
        gate.release(8)
        for other in others:
            other.result(10)
    assert len(seen) < 9, "the eight shared"
    assert all(any(f"{i}.png" in names for names in seen[1:]) for i in range(8))


def test_a_sync_that_fails_is_told_to_all_who_shared_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path) -> None:
        raise OSError(errno.EIO, "broken")

    store = LocalBlobs(tmp_path)
    store.put("a/first.png", b"1", "image/png")
    monkeypatch.setattr(local, "_sync_directory", fail)
    with pytest.raises(StorageUnavailable):
        store.put("a/b.png", b"2", "image/png")
    monkeypatch.undo()
    store.put("a/b.png", b"2", "image/png")
    assert store.get("a/b.png") == b"2"


def test_directories_that_are_empty_go_and_the_root_stays(store: BlobStore, root: Path) -> None:
    for key in ("a/b/one.png", "a/b/two.png", "a/c/three.png"):
        store.put(key, b"x", "image/png")
    store.delete(["a/b/one.png", "a/c/three.png"])
    assert sorted(path.name for path in (root / "a").iterdir()) == ["b"]
    store.delete(["a/b/two.png", "a/b/never-there.png"])
    assert list(root.iterdir()) == []
    store.put("a/b/one.png", b"again", "image/png")
    assert store.get("a/b/one.png") == b"again"


def test_puts_and_deletes_of_the_same_directories_at_once(store: BlobStore, root: Path) -> None:
    """Each delete leaves directories empty that another one's put is about to write into."""

    def churn(name: str) -> None:
        for n in range(150):
            key = f"pictures/{n % 2}/{name}.png"
            store.put(key, name.encode(), "image/png")
            assert store.get(key) == name.encode()
            store.delete([key])

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(churn, f"n{i}") for i in range(4)]:
            future.result()
    assert list(root.iterdir()) == []
