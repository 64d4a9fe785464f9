"""`farm dataset publish` to a hub: huggingface_hub against a server that keeps what it is sent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from farm.blobs import BlobStore, open_blobs
from farm.datasets import hub as hubs
from farm.datasets.hub import publish_to_hub
from farm.errors import AccessDenied, BlobDamaged, HubUnavailable, InvalidConfig, NotFound
from tests.cli_kit import command_line
from tests.dataset_hub import LARGE, REPO, TOKEN, DatasetHub
from tests.farm_kit import FAKES
from tests.place_kit import TYPE, dataset, files, picture, three
from tests.recipe_kit import write_recipe
from tests.runner_kit import LoneRunner

# huggingface_hub's own, of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TO = f"hf://datasets/{REPO}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = DatasetHub()
    try:
        yield hub
    finally:
        hub.stop()


def published(
    source: BlobStore, hub: DatasetHub, *, private: bool = False, token: str = TOKEN
) -> dict[str, bool]:
    """Which files were sent."""
    found: dict[str, bool] = {}
    tell = lambda file, new: found.update({file.key: new})  # noqa: E731
    url = publish_to_hub(source, "the source", TO, hub.url, token, private, tell)
    assert url == f"{hub.url}/datasets/{REPO}/commit/{hub.head}"
    return found


def kept(hub: DatasetHub) -> dict[str, bytes]:
    """Its files, but for the one that the hub itself began with."""
    return {key: data for key, data in hub.files.items() if key != ".gitattributes"}


def test_a_dataset_comes_in_one_commit(tmp_path: Path, hub: DatasetHub) -> None:
    source = three(tmp_path / "set")
    assert all(published(source, hub).values())
    assert kept(hub) == files(tmp_path / "set")
    (commit,) = hub.commits
    assert (commit.message, commit.put[-1], commit.deleted) == ("test: 3 rows", "manifest.json", [])
    assert len(hub.sent) == sum(key.endswith(LARGE) for key in kept(hub)) == 3
    assert not any(tmp_path.rglob("*.tmp*"))

    assert not any(published(source, hub).values())
    assert (len(hub.commits), len(hub.sent)) == (1, 3)


def test_only_what_changed_is_sent_and_what_is_gone_goes(tmp_path: Path, hub: DatasetHub) -> None:
    published(three(tmp_path / "three"), hub)
    hub.files["notes.md"] = b"of its owner"
    one = dataset(tmp_path / "one", [picture(0, "a"), picture(1, "b")])
    sent = published(one, hub)
    assert [key for key, new in sent.items() if new] == []
    assert kept(hub) == files(tmp_path / "one") | {"notes.md": b"of its owner"}
    assert sorted(hub.commits[-1].deleted) == [
        "stats/00001.json", "stats/00002.json", "webdataset/train-00001.tar",
        "webdataset/train-00002.tar",
    ]  # fmt: skip
    two = dataset(tmp_path / "two", [picture(0, "a"), picture(1, "other")])
    sent = published(two, hub)
    assert sorted(key for key, new in sent.items() if new) == [
        "stats/00000.json", "webdataset/train-00000.tar",
    ]  # fmt: skip
    assert kept(hub) == files(tmp_path / "two") | {"notes.md": b"of its owner"}
    assert len(hub.commits) == 3


def test_a_large_one_comes_in_parts_and_a_broken_off_one_is_gone_on_with(
    tmp_path: Path, hub: DatasetHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "TOGETHER_FILES", 1)
    monkeypatch.setattr(hubs, "COMMIT_FILES", 2)
    source = three(tmp_path / "set")
    told = []

    def breaks(file: Any, new: bool) -> None:
        told.append(file.key)
        if len(told) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_to_hub(source, "the source", TO, hub.url, TOKEN, False, breaks)
    assert [len(commit.put) for commit in hub.commits] == [3, 2]  # the first marks it as ours
    assert set(json.loads(hub.files["manifest.json"])) == {"layout", "name"}
    sent = published(source, hub)
    assert [key for key, new in sent.items() if not new] == told[:4]
    assert kept(hub) == files(tmp_path / "set")
    assert "manifest.json" in hub.commits[-1].put
    assert len(hub.sent) == len(set(hub.sent)) == 3, "what was sent is not sent again"


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_made_is_private_if_asked(
    tmp_path: Path, hub: DatasetHub, private: bool
) -> None:
    published(three(tmp_path / "set"), hub, private=private)
    assert hub.private is private
    published(three(tmp_path / "set"), hub, private=not private)
    assert hub.private is private, "one that was there is left as it is"


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"README.md": b"of somebody"}, "README.md lies in the repository me/shapes"),
        ({"stats/x.json": b"{}"}, "stats/x.json lies"),
        ({"manifest.json": b'{"name": "other"}'}, "a dataset named 'other' lies"),
        ({"manifest.json": b"[" * 9999}, "a dataset named 'None' lies"),
    ],
)
def test_what_others_have_there_is_left_alone(
    tmp_path: Path, hub: DatasetHub, there: dict[str, bytes], told: str
) -> None:
    hub.private = False
    hub.files |= there
    with pytest.raises(InvalidConfig, match=told):
        published(three(tmp_path / "set"), hub)
    assert (hub.files, hub.sent) == (there, [])


def test_who_changes_it_meanwhile_is_not_overwritten(tmp_path: Path, hub: DatasetHub) -> None:
    def meanwhile(file: Any, new: bool) -> None:
        hub.elsewhere += 1

    source = three(tmp_path / "set")
    with pytest.raises(
        InvalidConfig, match=r"somebody else changed it meanwhile .*publish it again"
    ):
        publish_to_hub(source, "the source", TO, hub.url, TOKEN, False, meanwhile)
    assert (kept(hub), hub.commits) == ({}, [])
    published(source, hub)


@pytest.mark.parametrize("key", ["README.md", "webdataset/train-00000.tar", "stats/00000.json"])
def test_what_is_damaged_is_not_published(tmp_path: Path, hub: DatasetHub, key: str) -> None:
    source = three(tmp_path / "set")
    source.put(key, b"changed", TYPE)
    with pytest.raises(BlobDamaged, match="is not what was written"):
        published(source, hub)
    assert hub.commits == []
    with pytest.raises(NotFound):
        published(open_blobs(str(tmp_path / "nothing")), hub)


COMMIT = ("POST", f"/api/datasets/{REPO}/commit/main")


@pytest.mark.parametrize(
    ("asked", "status", "kind", "told"),
    [
        (("POST", "/api/repos/create"), 403, AccessDenied, "refused .403.*HF_TOKEN"),
        (COMMIT, 403, AccessDenied, "refused"),
        (COMMIT, 500, HubUnavailable, "does not answer .500.*to go on"),
        (COMMIT, 413, InvalidConfig, "does not take it .413: not for you"),
        (("POST", f"/datasets/{REPO}.git/info/lfs/objects/batch"), 422, InvalidConfig, "not take"),
    ],
)
def test_what_the_hub_says_no_to(
    tmp_path: Path,
    hub: DatasetHub,
    asked: tuple[str, str],
    status: int,
    kind: type[Exception],
    told: str,
) -> None:
    hub.refuse[asked] = status
    with pytest.raises(kind, match=told) as caught:
        published(three(tmp_path / "set"), hub)
    assert TOKEN not in str(caught.value)
    assert kept(hub) == {}
    hub.refuse.clear()
    published(three(tmp_path / "set"), hub)
    assert kept(hub) == files(tmp_path / "set")


def test_a_wrong_token_and_no_hub(tmp_path: Path, hub: DatasetHub) -> None:
    source = three(tmp_path / "set")
    with pytest.raises(AccessDenied, match="HF_TOKEN must be one that may write there"):
        published(source, hub, token="hf_wrong")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(HubUnavailable, match=r"ConnectError: .*; publish it again"):
            publish_to_hub(source, "the source", TO, url, TOKEN, False, lambda file, new: None)


@pytest.mark.parametrize(
    "to",
    ["hf://me/shapes", "hf://datasets/shapes", "hf://datasets/me/../x", "hf://datasets/me/x@y"],
)
def test_what_names_no_repository(tmp_path: Path, hub: DatasetHub, to: str) -> None:
    with pytest.raises(InvalidConfig, match="expected hf://datasets/OWNER/NAME"):
        publish_to_hub(three(tmp_path), "here", to, hub.url, TOKEN, False, lambda file, new: None)
    assert hub.private is None


# ---- whole


READS = """
import datasets, json, sys
datasets.disable_progress_bars()
found = datasets.load_dataset(sys.argv[1], split="train", **json.loads(sys.argv[2]))
print(json.dumps([[sorted(row), row["prompt"], row["image"].size] for row in found]))
"""


def test_what_was_rendered_is_loaded_from_the_hub(
    tmp_path: Path,
    hub: DatasetHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models.toml").write_text(FAKES)
    prompts = {"template": "thing {n}", "lists": {"n": "1..4"}}
    recipe = write_recipe(
        tmp_path, prompts=prompts, shard_size=3, formats=["parquet", "imagefolder"]
    )
    with command_line(home, monkeypatch, capsys) as run:
        monkeypatch.setenv("FARM_BROKER_URL", f"redis+socket://{tmp_path}/nobody.sock")
        monkeypatch.setenv("FARM_MODELS_FILE", str(home / "models.toml"))
        monkeypatch.setenv("FARM_HUB_URL", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        with LoneRunner(home, max_failures=1) as lone, lone.working():
            code, _, err = run("dataset", "run", recipe)
            assert code == 0, err
        code, out, err = run("dataset", "publish", recipe, TO)
        assert code == 0, err
        assert out == f"{hub.url}/datasets/{REPO}/commit/{hub.head}\n"
        assert f"copied to {TO}, 0 were there" in err
        code, out, _ = run("dataset", "publish", recipe, TO, "--json")
        told = json.loads(out)
        assert (code, told["copied"], told["url"][-40:]) == (0, 0, hub.head)
        code, out, err = run("dataset", "publish", recipe, "copy", "--private")
        assert (code, out, "--private" in err) == (2, "", True)
    assert kept(hub) == files(tmp_path / "out")
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    for more in ({}, {"data_dir": "imagefolder"}):
        words = [sys.executable, "-c", READS, REPO, json.dumps(more)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        # `datasets` takes a hub's image folders in no certain order
        assert sorted(row[1] for row in rows) == [f"thing {n}" for n in range(1, 5)]
        assert all("image" in row[0] for row in rows)
