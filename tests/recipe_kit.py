"""Recipes for tests, and what their datasets hold."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from farm.blobs import BlobStore
from farm.datasets.batches import Tell
from farm.datasets.recipe import Recipe, load_recipe
from farm.datasets.stats import OWN
from farm.store.batches import BatchStatus
from tests.farm_kit import ROOT

COLOURS = ("red", "green", "blue", "yellow", "purple")


def write_recipe(folder: Path, *, name: str = "test", **told: Any) -> Path:
    """A recipe of the fake model: five colours, each of twenty things, unless `told` otherwise.

    `told`: top-level keys, and sections as mappings; JSON of one line is TOML's too, but for its
    colons and nulls.
    """
    lists = {"colour": list(COLOURS), "thing": [f"thing{i}" for i in range(20)]}
    whole: dict[str, Any] = {
        "name": name,
        "out": "out",
        "shard_size": 10,
        "prompts": {"template": "a {colour} {thing}", "lists": lists},
        "params": {"model": "fake-fast"},
        "card": {"licence": "cc0-1.0"},
        **told,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in whole.items()))
    return path


def recipe(folder: Path, **told: Any) -> Recipe:
    return load_recipe(write_recipe(folder, **told))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


class Quiet(Tell):
    """Hears all of a run and says nothing; `shards`: (number, whether it was written)."""

    def __init__(self) -> None:
        self.shards: list[tuple[int, bool]] = []
        self.troubles: list[str] = []

    def queued(self, total: int) -> None:
        pass

    def batch(self, status: BatchStatus) -> None:
        pass

    def waits(self, status: BatchStatus) -> None:
        pass

    def shard(self, shard: int, shards: int, written: bool) -> None:
        self.shards.append((shard, written))

    def trouble(self, text: str) -> None:
        self.troubles.append(text)


def shard_hashes(place: BlobStore) -> dict[str, str]:
    """SHA-256 of every file of every shard, by key; stats tell times and are left out."""
    keys = [one.key for prefix in OWN if prefix != "stats/" for one in place.list(prefix)]
    return {key: hashlib.sha256(place.get(key)).hexdigest() for key in keys}


def farm_command(env: dict[str, str], *args: str, **more: Any) -> subprocess.Popen[bytes]:
    """`farm ARGS` as a process of its own."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    whole = env | {"PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-m", "farm", *args], env=whole, **pipes)
