"""Runs of datasets: gates, changed recipes, two at once, outages, cancels, lost pictures."""

from __future__ import annotations

import _thread
import json
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import update

from farm import retention
from farm.blobs import BlobStore
from farm.datasets import batches
from farm.datasets import run as run_room
from farm.datasets.manifest import verify
from farm.datasets.place import open_place
from farm.datasets.plan import plan
from farm.datasets.run import Summary, run
from farm.datasets.status import status
from farm.errors import (
    BlobDamaged,
    BlobNotFound,
    DatabaseUnavailable,
    Invalid,
    InvalidConfig,
    StorageUnavailable,
)
from farm.service import Farm
from farm.store.ids import JobRef
from farm.store.tables import jobs as jobs_table
from farm.store.tables import leases as leases_table
from tests.farm_kit import until
from tests.recipe_kit import Quiet, recipe, shard_hashes
from tests.runner_kit import LoneRunner, NoBroker

MODELS = """
[models.fake-fast]
licence = "none"
defaults = {{ width = 32, height = 32, steps = 1 }}
[models.fake-fast.engines.fake]
micro_batch = 32
options = {{ fragile = "{fragile}" }}
"""
SMALL: dict[str, Any] = {
    "prompts": {"template": "thing {n}", "lists": {"n": "1..12"}},
    "shard_size": 5,
}
TWINS = [("fig", 1), ("nut", 2), ("fig", 1), ("pea", 3), ("nut", 2), ("fig", 1)]
"""Prompts and their seeds: equal ones make equal pictures."""


def farm_of(folder: Path, **told: Any) -> LoneRunner:
    """Pictures of prompts with the word in the file `fragile` fail, and at once."""
    models = MODELS.format(fragile=folder / "fragile")
    return LoneRunner(folder / "home", models=models, max_failures=1, **told)


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[LoneRunner]:
    """A farm whose worker only works when it is asked to."""
    with farm_of(tmp_path) as lone:
        yield lone


@pytest.fixture
def lone(idle: LoneRunner) -> Iterator[LoneRunner]:
    with idle.working():
        yield idle


def make(lone: LoneRunner, folder: Path, label: str = "", **told: Any) -> Summary:
    redrive = told.pop("redrive", False)
    return run(lone.farm, recipe(folder, **told), label, redrive=redrive, tell=Quiet())


def place_of(lone: LoneRunner, made: Summary) -> BlobStore:
    return open_place(made.out, lone.settings)


def whole(lone: LoneRunner, made: Summary) -> dict[str, str]:
    """The hashes of its shards, once nothing is wrong with them and nothing left over."""
    place = place_of(lone, made)
    found = verify(place, made.out)
    assert (found.wrong, found.extra) == ([], [])
    return shard_hashes(place)


def stats(lone: LoneRunner, made: Summary, shard: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(place_of(lone, made).get(f"stats/{shard:05d}.json"))
    return told


def twins(folder: Path, **told: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "seed": seed}) for prompt, seed in TWINS]
    (folder / "twins.jsonl").write_text("\n".join(lines))
    return {"prompts": {"file": "twins.jsonl"}, "shard_size": 4, **told}


# ---- gates


def test_rejected_rows_are_tried_again_and_the_history_is_kept(
    tmp_path: Path, database_url: str
) -> None:
    with farm_of(tmp_path, database_url=database_url) as lone, lone.working():
        told = twins(tmp_path / "sets", gates={"attempts": 3})
        made = make(lone, tmp_path / "sets", **told)
        assert (made.counts["accepted"], made.rendered) == (6, lone.rendered)
        hashes = whole(lone, made)
        tries = {**stats(lone, made)["tries"], **stats(lone, made, 1)["tries"]}
        assert sorted(tries) == ["2", "4", "5"]
        first = tries["5"][0]
        assert (first["seed"], first["gate"]) == (1, "exact_duplicates")
        assert first["why"] == "the pixels of row 0"
        rows = [row for n in (0, 1) for row in stats(lone, made, n)["pictures"]]
        assert len({sha256 for _, sha256, _ in rows}) == 6

        rendered = lone.rendered
        again = make(lone, tmp_path / "sets", **told)
        assert (again.rendered, again.kept, again.written) == (0, 2, 0)
        shutil.rmtree(made.out)
        anew = make(lone, tmp_path / "sets", **told)
        assert (anew.written, lone.rendered) == (2, rendered)
        assert whole(lone, anew) == hashes


def test_without_further_attempts_duplicates_are_left_out(lone: LoneRunner, tmp_path: Path) -> None:
    made = make(lone, tmp_path / "sets", **twins(tmp_path / "sets"))
    assert made.counts == {"accepted": 3, "rejected": 3, "failed": 0, "cancelled": 0}
    assert made.whole
    whole(lone, made)
    more = make(lone, tmp_path / "sets", **twins(tmp_path / "sets", gates={"attempts": 2}))
    assert more.counts["accepted"] == 6
    none = make(lone, tmp_path / "sets", **twins(tmp_path / "sets", gates={"min_side": 64}))
    assert none.counts["rejected"] == 6
    assert whole(lone, none) == {}


def test_a_redrive_decides_as_if_nothing_had_failed(lone: LoneRunner, tmp_path: Path) -> None:
    """While twins fail, their others are tried again and take their places."""
    told = twins(tmp_path / "sets", gates={"attempts": 2})
    (tmp_path / "fragile").write_text("fig")
    failed = make(lone, tmp_path / "sets", **told)
    assert (failed.counts["failed"], failed.counts["accepted"]) == (3, 3)
    whole(lone, failed)
    (tmp_path / "fragile").unlink()
    driven = whole(lone, make(lone, tmp_path / "sets", **told, redrive=True))
    shutil.rmtree(tmp_path / "sets" / "out")
    with farm_of(tmp_path / "calm") as calm, calm.working():
        assert whole(calm, make(calm, tmp_path / "sets", **told)) == driven


@pytest.mark.parametrize("safety", ["reject", "fail"])
def test_what_the_safety_checker_refuses(lone: LoneRunner, tmp_path: Path, safety: str) -> None:
    (tmp_path / "fragile").write_text("thing 3")
    told = {**SMALL, "gates": {"safety": safety, "attempts": 2}}
    made = make(lone, tmp_path / "sets", **told)
    assert made.counts["failed"] == 1
    blocked = update(jobs_table).where(jobs_table.c.error_code == "ERR_RENDER_FAILED")
    with lone.farm.db.write() as connection:
        connection.execute(blocked.values(error_code="ERR_BLOCKED"))
    (tmp_path / "fragile").unlink()
    made = make(lone, tmp_path / "sets", **told)
    whole(lone, made)
    if safety == "fail":
        assert made.counts["failed"] == 1
        assert stats(lone, made)["failed"]["2"]["code"] == "ERR_BLOCKED"
        assert make(lone, tmp_path / "sets", **told, redrive=True).counts["accepted"] == 12
    else:
        assert made.counts["accepted"] == 12
        (tried,) = stats(lone, made)["tries"]["2"]
        assert (tried["gate"], tried["sha256"]) == ("safety", None)
        assert made.rendered == 1


# ---- recipes that change


def test_formats_and_shards_may_change_and_nothing_is_left_over(
    lone: LoneRunner, tmp_path: Path
) -> None:
    folder = tmp_path / "sets"
    both = {**SMALL, "formats": ["webdataset", "imagefolder"]}
    first = make(lone, folder, **both)
    hashes = whole(lone, first)
    rendered = lone.rendered
    ways: list[tuple[dict[str, Any], int]] = [
        ({**SMALL, "formats": ["parquet"]}, 3),
        ({**both, "shard_size": 12}, 1),
        ({**both, "gates": {"min_side": 64}}, 3),
        ({**both, "shard_size": 3}, 4),
        (both, 3),
    ]
    for told, shards in ways:
        made = make(lone, folder, **told)
        assert (made.batch, made.shards, made.written) == (first.batch, shards, shards)
        last = whole(lone, made)
        assert {key.partition("/")[0] for key in last} <= set(told["formats"])
    assert lone.rendered == rendered
    assert last == hashes
    fewer = make(lone, folder, **{**both, "filters": {"limit": 6}})
    assert (fewer.rows, fewer.rendered, fewer.kept) == (6, 0, 1)
    whole(lone, fewer)


def test_files_of_a_shard_that_was_killed_are_not_left(lone: LoneRunner, tmp_path: Path) -> None:
    told = {**SMALL, "formats": ["imagefolder"]}
    made = make(lone, tmp_path / "sets", **told)
    hashes, place = whole(lone, made), place_of(lone, made)
    place.put("imagefolder/train-00000/00000009.png", b"left", "image/png")
    place.put("imagefolder/train-00000/metadata.jsonl", b"half", "application/jsonl")
    place.delete(["stats/00000.json", "manifest.json"])
    with pytest.raises(InvalidConfig, match="lies in the place"):
        make(lone, tmp_path / "sets", **told)
    place.put("manifest.json", b'{"name": "test"}', "application/json")
    assert make(lone, tmp_path / "sets", **told).written == 1
    assert whole(lone, made) == hashes


def test_damaged_shards_and_stats_are_written_anew(lone: LoneRunner, tmp_path: Path) -> None:
    made = make(lone, tmp_path / "sets", **SMALL)
    hashes, place = whole(lone, made), place_of(lone, made)
    spoilt = json.loads(place.get("stats/00001.json")) | {"measures": {"x": 1}}
    damages: list[tuple[str, bytes]] = [
        ("webdataset/train-00000.tar", b""),
        ("stats/00001.json", b"{"),
        ("stats/00001.json", b'{"content": "x"}'),
        ("stats/00001.json", json.dumps(spoilt).encode()),
        ("stats/00002.json", place.get("stats/00000.json")),
    ]
    for key, data in damages:
        place.put(key, data, "application/octet-stream")
        again = make(lone, tmp_path / "sets", **SMALL)
        assert (again.written, again.rendered) == (1, 0), key
        assert whole(lone, again) == hashes


def test_a_catalogue_that_changed_makes_another_batch(lone: LoneRunner, tmp_path: Path) -> None:
    first = make(lone, tmp_path / "sets", **SMALL)
    models = lone.settings.home / "models.toml"
    models.write_text(models.read_text().replace("steps = 1", "steps = 2"))
    with Farm(lone.settings) as farm:
        farm.__dict__["broker"] = NoBroker()
        told = recipe(tmp_path / "sets", **SMALL)
        assert plan(farm, told).to_render == 12
        made = run(farm, told, tell=Quiet())
    assert made.batch != first.batch
    assert made.rendered == 12


def changed_meanwhile(idle: LoneRunner, folder: Path, change: Callable[[Path], None]) -> None:
    """The prompts are changed while a run waits for its first shard."""
    folder.mkdir()
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{n}", "id": n}) + "\n" for n in range(9)))

    class Changing(Quiet):
        def waits(self, status: Any) -> None:
            change(file)
            idle.work(status)

    told = recipe(folder, prompts={"file": "p.jsonl", "keep": ["id"]}, shard_size=3)
    with pytest.raises(InvalidConfig, match="changed while the run was under way"):
        run(idle.farm, told, tell=Changing())
    assert status(idle.farm, told).finished is False


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text(file.read_text().replace('"id": 1', '"id": 77')),
        lambda file: file.write_text(file.read_text().replace('"p8"', '"q8"')),
        lambda file: file.write_text(""),
        lambda file: file.write_text(file.read_text() + '{"prompt": "more", "id": 1}\n'),
        lambda file: file.write_text("[]\n" * 9),
    ],
    ids=["column", "prompt", "emptied", "longer", "spoilt"],
)
def test_prompts_that_change_during_a_run(
    idle: LoneRunner, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    changed_meanwhile(idle, tmp_path / "sets", change)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"params": {"model": "none"}}, "params.model: one of "),
        ({"params": {"model": "fake-fast", "steps": 0}}, "params.steps: "),
        ({"filters": {"min_chars": 500}}, "no prompt"),
    ],
    ids=["model", "steps", "filtered"],
)
def test_bad_rows_queue_nothing(
    idle: LoneRunner, tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    told = {"prompts": {"template": "thing {n}", "lists": {"n": [1]}}, **told}
    with pytest.raises(Invalid, match=words):
        make(idle, tmp_path / "sets", **told)
    with pytest.raises(Invalid):
        plan(idle.farm, recipe(tmp_path / "sets", **told))
    assert idle.farm.batches() == []


# ---- what changes between two runs


def test_a_changed_input_picture_is_rendered_anew(lone: LoneRunner, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    params = {"model": "fake-fast", "init_image": "i.png", "strength": 0.5}
    told: dict[str, Any] = SMALL | {"params": params}
    Image.new("RGB", (64, 64), "red").save(folder / "i.png")
    first = make(lone, folder, **told)
    assert make(lone, folder, **told).kept == 3
    Image.new("RGB", (64, 64), "blue").save(folder / "i.png")
    assert plan(lone.farm, recipe(folder, **told)).to_render == 12
    second = make(lone, folder, **told)
    assert (second.rendered, second.written) == (12, 3)
    assert second.batch != first.batch

    rows = [{"prompt": f"p{n}", "init_image": "i.png", "strength": 0.5} for n in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed: dict[str, Any] = {"prompts": {"file": "p.jsonl"}}
    make(lone, folder, **listed)
    Image.new("RGB", (64, 64), "green").save(folder / "i.png")
    with pytest.raises(InvalidConfig, match="pictures that rows begin with"):
        make(lone, folder, **listed)


def test_a_column_of_another_kind_changes_every_shard(lone: LoneRunner, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"prompt": f"p{n}"} for n in range(4)]
    rows[0]["id"] = 1
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: dict[str, Any] = {"shard_size": 2, "formats": ["parquet"]}
    make(lone, folder, prompts={"file": "p.jsonl", "keep": {"id": "int"}}, **told)
    made = make(lone, folder, prompts={"file": "p.jsonl", "keep": {"id": "text"}}, **told)
    assert (made.written, made.rendered) == (2, 0)


PLUGIN = """
from pathlib import Path
HERE = Path(__file__).parent
class Score:
    def __init__(self):
        with (HERE / "made").open("a") as file:
            file.write("x")
    def score(self, image, prompt):
        return {value}
"""


def test_a_plugin_is_built_once_a_run_and_its_code_counts(
    lone: LoneRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "sets"
    folder.mkdir()
    score = {"name": "s", "plugin": "a_plugin_of_ours:Score", "min": 0.5}
    told: dict[str, Any] = SMALL | {"gates": {"scores": [score]}}
    for value, counts in ((1, (12, 0)), (0, (0, 12))):
        (folder / "a_plugin_of_ours.py").write_text(PLUGIN.format(value=value))
        made = make(lone, folder, **told)
        sys.modules.pop("a_plugin_of_ours")  # each run is a process of its own
        assert (made.counts["accepted"], made.counts["rejected"]) == counts
    assert (folder / "made").read_text() == "xx"


def test_plan_and_status_say_what_a_run_would_do(lone: LoneRunner, tmp_path: Path) -> None:
    (tmp_path / "fragile").write_text("thing 3")
    make(lone, tmp_path / "sets", **SMALL)
    told = recipe(tmp_path / "sets", **SMALL)
    found = plan(lone.farm, told)
    assert (found.to_render, found.failed, found.reused) == (0, 1, 11)
    assert status(lone.farm, told).finished
    other = recipe(tmp_path / "sets", **SMALL, formats=["parquet"])
    assert not status(lone.farm, other).finished
    assert make(lone, tmp_path / "sets", **SMALL, formats=["parquet"]).rendered == 0
    assert status(lone.farm, other).finished


# ---- one at a time


class Hearing(Quiet):
    """Tells when a word is said."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word, self.heard = word, threading.Event()

    def trouble(self, text: str) -> None:
        if self._word in text:
            self.heard.set()


def test_a_second_run_waits_for_the_first(idle: LoneRunner, tmp_path: Path) -> None:
    (tmp_path / "fragile").write_text("thing 3")
    told = recipe(tmp_path / "sets", **SMALL)
    first, second = Hearing(""), Hearing("another run writes to")
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, idle.farm, told, tell=first)
        until(lambda: idle.farm.batches(), 30)
        other = pool.submit(run, idle.farm, told, redrive=True, tell=second)
        assert second.heard.wait(20)
        assert not other.done()
        with idle.working():
            assert one.result(60).counts["failed"] == 1
            (tmp_path / "fragile").unlink()
            made = other.result(60)
    assert (made.counts["accepted"], made.written, made.kept) == (12, 1, 2)
    assert whole(idle, made)


def test_a_run_that_lost_its_place_writes_no_more(
    idle: LoneRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.datasets.alone.RENEW_S", 0.02)
    told = recipe(tmp_path / "sets", **SMALL)
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(run, idle.farm, told, tell=Quiet())
        until(lambda: idle.farm.batches(), 30)
        with idle.farm.db.write() as connection:
            connection.execute(update(leases_table).values(holder="x", expires_at=2.0**40))
        until(lambda: not any(t.name == "dataset-lease" for t in threading.enumerate()), 30)
        with idle.working(), pytest.raises(Invalid, match="taken over"):
            one.result(60)
    assert not list((tmp_path / "sets" / "out").glob("webdataset/*"))


# ---- what befalls a run


def test_status_before_and_after_a_run(lone: LoneRunner, tmp_path: Path) -> None:
    told = recipe(tmp_path / "sets", **SMALL)
    before = status(lone.farm, told)
    assert (before.batch, before.finished, before.shards, before.stats) == (None, False, 0, 0)
    assert not (tmp_path / "sets" / "out").exists()
    run(lone.farm, told, tell=Quiet())
    after = status(lone.farm, told)
    assert (after.finished, after.shards, after.stats) == (True, 3, 3)
    assert after.counts["accepted"] == 12
    assert status(lone.farm, told, "tomorrow").batch is None


def test_what_was_cancelled_is_told_and_can_be_driven_again(
    idle: LoneRunner, tmp_path: Path
) -> None:
    class Cancelling(Quiet):
        def batch(self, status: Any) -> None:
            idle.farm.cancel(status.id)

    made = run(idle.farm, recipe(tmp_path / "sets", **SMALL), tell=Cancelling())
    assert (made.counts["cancelled"], made.whole) == (12, False)
    assert whole(idle, made) == {}
    with idle.working():
        assert make(idle, tmp_path / "sets", **SMALL).counts["cancelled"] == 12
        driven = make(idle, tmp_path / "sets", **SMALL, redrive=True)
    assert (driven.counts["accepted"], driven.rendered, driven.whole) == (12, 12, True)
    whole(idle, driven)


def test_a_paused_batch_is_waited_for(lone: LoneRunner, tmp_path: Path) -> None:
    class Pausing(Quiet):
        waited = 0

        def batch(self, status: Any) -> None:
            lone.farm.pause(status.id)

        def waits(self, status: Any) -> None:
            self.waited += 1
            if status.paused and self.waited > 1:
                lone.farm.pause(status.id, paused=False)

    pausing = Pausing()
    made = run(lone.farm, recipe(tmp_path / "sets", **SMALL), tell=pausing)
    assert made.counts["accepted"] == 12


def test_a_batch_that_was_pruned_is_rendered_again(lone: LoneRunner, tmp_path: Path) -> None:
    made = make(lone, tmp_path / "sets", **SMALL)
    hashes = whole(lone, made)
    retention.prune(lone.farm.db, lone.farm.blobs, [made.batch])
    again = make(lone, tmp_path / "sets", **SMALL)
    assert again.batch != made.batch
    assert (again.rendered, again.kept) == (12, 3)
    assert whole(lone, again) == hashes


@pytest.mark.parametrize(("lost", "kind"), [(True, BlobNotFound), (False, BlobDamaged)])
def test_a_lost_picture_says_what_to_do_and_that_helps(
    lone: LoneRunner, tmp_path: Path, lost: bool, kind: type[Exception]
) -> None:
    made = make(lone, tmp_path / "sets", **SMALL)
    hashes = whole(lone, made)
    key = lone.farm.job(f"{made.batch}/7").object_key
    assert key
    if lost:
        lone.farm.blobs.delete([key])
    else:
        lone.farm.blobs.put(key, b"spoilt", "image/png")
    assert make(lone, tmp_path / "sets", **SMALL).kept == 3, "its shard is whole"
    shutil.rmtree(made.out)
    with pytest.raises(kind, match="farm dataset redrive"):
        make(lone, tmp_path / "sets", **SMALL)
    shutil.rmtree(made.out)
    anew = make(lone, tmp_path / "sets", redrive=True, **SMALL)
    assert (anew.rendered, anew.written, anew.kept) == (1, 3, 0)
    assert whole(lone, anew) == hashes
    assert lone.farm.job(f"{made.batch}/7").object_key == key, "no arrow leads out of succeeded"
    shutil.rmtree(made.out)
    once_more = make(lone, tmp_path / "sets", **SMALL)
    assert (once_more.rendered, once_more.reused) == (0, 12)
    assert whole(lone, once_more) == hashes


def test_lost_pictures_of_further_attempts_are_rendered_anew(
    lone: LoneRunner, tmp_path: Path
) -> None:
    told = twins(tmp_path / "sets", gates={"attempts": 3})
    made = make(lone, tmp_path / "sets", **told)
    hashes, rendered = whole(lone, made), lone.rendered
    for one in list(lone.farm.blobs.list("pictures/")):
        lone.farm.blobs.delete([one.key])
    shutil.rmtree(made.out)
    anew = make(lone, tmp_path / "sets", redrive=True, **told)
    assert anew.counts == made.counts
    assert whole(lone, anew) == hashes
    assert lone.rendered - rendered == 6, "each once, whatever jobs share it"


def test_lost_pictures_beside_failed_rows_and_of_what_was_rendered_anew(
    lone: LoneRunner, tmp_path: Path
) -> None:
    (tmp_path / "fragile").write_text("thing 11")
    made = make(lone, tmp_path / "sets", **SMALL)
    assert made.counts["failed"] == 1
    mine = f"pictures/{made.batch}/"
    for _ in range(3):
        there = [one.key for one in lone.farm.blobs.list("pictures/")]
        lost = [key for key in there if not key.startswith(mine) or f"{mine}0000001-" in key]
        assert len(lost) == 1
        lone.farm.blobs.delete(lost)
        shutil.rmtree(made.out)
        driven = make(lone, tmp_path / "sets", redrive=True, **SMALL)
        assert (driven.counts["accepted"], driven.counts["failed"]) == (11, 1)
        whole(lone, driven)
    told = [event["kind"] for event in lone.farm.history(JobRef(made.batch, 10))]
    assert told.count("redriven") == 3, "once each time"


def test_a_store_that_keeps_nothing_is_told(
    lone: LoneRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(lone, tmp_path / "sets", **SMALL)
    rendered = lone.rendered

    def gone(self: Farm, job: Any) -> bytes:
        raise BlobNotFound("there is no object")

    monkeypatch.setattr(Farm, "fetch", gone)
    with pytest.raises(BlobNotFound, match="there is no object"):
        make(lone, tmp_path / "sets", redrive=True, **{**SMALL, "out": "other"})
    assert lone.rendered - rendered == SMALL["shard_size"], "those of one shard, once"


def test_two_runs_at_once_in_one_place(lone: LoneRunner, tmp_path: Path) -> None:
    told = recipe(tmp_path / "sets", **{**SMALL, "formats": ["webdataset", "imagefolder"]})
    made: list[Summary] = []

    def one() -> None:
        with Farm(lone.settings) as farm:
            farm.__dict__["broker"] = NoBroker()
            made.append(run(farm, told, tell=Quiet()))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 2
    assert made[0].batch == made[1].batch
    assert made[0].counts == made[1].counts
    assert lone.rendered == 12
    whole(lone, made[0])


# ---- outages


class Flaky:
    """Each method fails the first time for each key, or `ever`."""

    def __init__(self, inner: Any, error: Exception, *, ever: bool = False) -> None:
        self._inner, self._error, self._ever = inner, error, ever
        self._failed: set[Any] = set()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found) or name in ("close", "dialect", "shown"):
            return found

        def call(*args: Any, **more: Any) -> Any:
            about = [key for key, *_ in args[0]] if name == "put_files" else args[:1]
            mark = (name, str(about))
            if self._ever or mark not in self._failed:
                self._failed.add(mark)
                raise self._error
            return found(*args, **more)

        return call


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "AWAY_S", 0.001)
    monkeypatch.setattr(batches, "MAX_AWAY_S", 0.01)


def flaky_run(
    lone: LoneRunner, folder: Path, monkeypatch: pytest.MonkeyPatch, *, ever: bool = False
) -> tuple[Summary, Quiet]:
    """By a farm whose blob store, and whose dataset's place, fail now and then."""
    away = StorageUnavailable("the store is away")
    opened = run_room.open_place
    if not ever:
        monkeypatch.setattr(run_room, "open_place", lambda *told: Flaky(opened(*told), away))
    tell = Quiet()
    with Farm(lone.settings) as farm:
        farm.__dict__["broker"] = NoBroker()
        farm.__dict__["blobs"] = Flaky(farm.blobs, away, ever=ever)
        return run(farm, recipe(folder, **SMALL), tell=tell), tell


@pytest.mark.usefixtures("hasty")
def test_a_blob_store_that_fails_once_everywhere_is_waited_out(
    lone: LoneRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = whole(lone, make(lone, tmp_path / "calm", **SMALL))
    made, tell = flaky_run(lone, tmp_path / "sets", monkeypatch)
    assert made.counts["accepted"] == 12
    assert whole(lone, made) == calm
    assert tell.troubles
    assert all("away; waiting until it is back" in told for told in tell.troubles)


@pytest.mark.usefixtures("hasty")
def test_a_database_that_fails_again_and_again_is_waited_out(
    lone: LoneRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, draw = Quiet(), random.Random(6)
    with Farm(lone.settings) as farm:
        farm.__dict__["broker"] = NoBroker()
        for name in ("read", "write"):
            way = getattr(farm.db, name)

            def call(way: Any = way) -> Any:
                if draw.random() < 0.3:
                    raise DatabaseUnavailable("the database is away")
                return way()

            monkeypatch.setattr(farm.db, name, call)
        monkeypatch.setattr(farm, "_ring", lambda: None)
        told = {**SMALL, "gates": {"attempts": 2, "min_side": 33}}
        made = run(farm, recipe(tmp_path / "sets", **told), tell=tell)
    assert made.counts["rejected"] == 12
    assert lone.rendered == 24
    assert tell.troubles


# Python itself leaves a directory open if Ctrl-C comes between os.scandir and its `with`.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*ScandirIterator:Warning")
@pytest.mark.filterwarnings("ignore:unclosed scandir iterator:ResourceWarning")
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("gates", [{}, {"blank": False, "exact_duplicates": False}])
def test_ctrl_c_ends_a_run_whose_store_never_comes_back(
    lone: LoneRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gates: dict[str, Any]
) -> None:
    """While it measures pictures, and while it writes a shard."""
    make(lone, tmp_path / "sets", **SMALL)
    shutil.rmtree(tmp_path / "sets" / "out")
    monkeypatch.setitem(SMALL, "gates", gates)
    timer = threading.Timer(0.5, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        flaky_run(lone, tmp_path / "sets", monkeypatch, ever=True)
    ours = ("measure", "fetch", "put")
    left = [thread for thread in threading.enumerate() if thread.name.startswith(ours)]
    for thread in left:  # Ctrl-C may come just as they are waited for
        thread.join(10)
    assert not [thread.name for thread in left if thread.is_alive()]
