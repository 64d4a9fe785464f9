"""A recipe that was not changed renders nothing; a changed one renders only what is new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farm.blobs import open_blobs
from farm.datasets.plan import plan
from farm.datasets.run import Summary, run
from tests.recipe_kit import COLOURS, Quiet, recipe, shard_hashes
from tests.runner_kit import LoneRunner

THINGS = [f"thing{i}" for i in range(8)]
ROWS = len(COLOURS) * len(THINGS)


@pytest.fixture
def lone(tmp_path: Path, database_url: str) -> Iterator[LoneRunner]:
    """A worker that works on and on."""
    told: Any = {"database_url": database_url, "max_failures": 1}
    with LoneRunner(tmp_path / "home", **told) as lone, lone.working():
        yield lone


def lists(colours: tuple[str, ...] = COLOURS) -> dict[str, Any]:
    told = {"colour": list(colours), "thing": THINGS}
    return {"template": "a {colour} {thing}", "lists": told}


def make(lone: LoneRunner, folder: Path, label: str = "", **told: Any) -> tuple[Summary, int]:
    """The summary, and how many pictures the engine rendered meanwhile."""
    before = lone.rendered
    told = {"prompts": lists(), **told}
    made = run(lone.farm, recipe(folder, **told), label, tell=Quiet())
    assert made.whole
    return made, lone.rendered - before


def test_what_is_there_is_not_rendered_again(lone: LoneRunner, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    first, rendered = make(lone, folder)
    assert (first.rows, first.counts["accepted"], rendered) == (ROWS, ROWS, ROWS)
    out = open_blobs(first.out)
    hashes = shard_hashes(out)

    again, rendered = make(lone, folder)
    assert (again.batch, again.rendered, rendered) == (first.batch, 0, 0)
    assert (again.kept, again.written) == (first.shards, 0)

    told = plan(lone.farm, recipe(folder, prompts=lists()), "night-2")
    assert (told.reused, told.to_render, told.batch) == (ROWS, 0, None)
    night, rendered = make(lone, folder, "night-2")  # another run of the same recipe
    assert night.batch != first.batch
    assert (night.rendered, night.kept, rendered) == (0, first.shards, 0)

    shutil.rmtree(first.out)
    anew, rendered = make(lone, folder)
    assert (anew.written, rendered) == (first.shards, 0)
    assert shard_hashes(out) == hashes


def test_one_of_five_colours_is_a_fifth(lone: LoneRunner, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    first, _ = make(lone, folder, shard_size=len(THINGS))
    hashes = shard_hashes(open_blobs(first.out))
    changed = lists(("red", "green", "orange", "yellow", "purple"))

    told = plan(lone.farm, recipe(folder, prompts=changed, shard_size=len(THINGS)))
    assert (told.rows, told.to_render) == (ROWS, ROWS // 5)
    made, rendered = make(lone, folder, prompts=changed, shard_size=len(THINGS))
    assert rendered == made.rendered == ROWS // 5
    assert (made.written, made.kept) == (1, 4)
    now = shard_hashes(open_blobs(made.out))
    assert [key for key in hashes if now[key] != hashes[key]] == ["webdataset/train-00002.tar"]


def test_prompts_that_are_added_are_all_that_is_new(lone: LoneRunner, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    file = folder / "prompts.jsonl"
    told: Any = {"prompts": {"file": "prompts.jsonl"}, "pictures": 2, "shard_size": 4}

    def prompts(n: int) -> None:
        file.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(n)))

    prompts(10)
    first, rendered = make(lone, folder, **told)
    assert (first.rows, rendered) == (20, 20)
    prompts(13)
    grown, rendered = make(lone, folder, **told)
    assert (grown.rows, rendered, grown.kept) == (26, 6, 5)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(['{"prompt": "new"}', *reversed(lines)]) + "\n")
    moved, rendered = make(lone, folder, **told)
    assert (moved.rows, rendered) == (28, 2)
    prompts(13)
    more, rendered = make(lone, folder, **{**told, "pictures": 3})
    assert (more.rows, rendered) == (39, 13)  # those that were there keep their seeds
