"""Imports point down only, and a machine that submits needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each room of farm/ and how high it stands; an import must point to a lower room or its own.
HEIGHT = {
    "states": 0, "errors": 0, "faults": 0, "demo": 0,
    "samplers": 1, "weight_files": 1, "spec": 2, "config": 1, "units": 0.5, "logs": 1,
    "picture_bounds": 1, "png": 1, "parquet_rows": 1,
    "catalog": 3, "checks": 3,
    "abilities": 4, "templates": 4, "prompt_files": 4, "pinning": 3.5, "prompts": 5, "models": 5,
    "blobs": 3, "broker": 4, "store": 4, "children": 4, "engines": 4, "local_broker": 4,
    "pictures": 5, "inputs": 5, "results": 6, "retention": 6, "verdict": 5,
    "submitting": 5, "preview": 5, "dispatch": 6, "reconcile": 6.5, "dispatcher": 7,
    "audit": 7, "auto": 7,
    "provenance": 4.5, "notify": 4.5, "schedules": 6.6, "datasets": 8.5,
    "service": 8, "client": 8, "http": 9, "doctor": 9, "embedded": 9,
    "cli": 10, "__main__": 11, "__init__": 11,
}  # fmt: skip
ENGINE_MAY = {
    "workers.engine",
    "workers.engines",
    "farm.spec",
    "farm.errors",
    "farm.catalog",
    "farm.samplers",
    "farm.weight_files",
}


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports, outside of `if TYPE_CHECKING`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", _files("farm"), ids=lambda p: str(p.relative_to(ROOT)))
def test_farm_points_down(path: Path) -> None:
    here = path.relative_to(ROOT / "farm").parts[0].removesuffix(".py")
    if path.relative_to(ROOT).as_posix() == "farm/demo/run.py":
        here = "cli"
    for name in _imports(path):
        assert not name.startswith("workers"), f"{path} imports {name}"
        if name.startswith("farm.") and _room(name) in HEIGHT and _room(name) != here:
            assert HEIGHT[_room(name)] < HEIGHT[here], f"{path}: {here} imports {name}"


def test_every_room_has_its_height() -> None:
    rooms = {p.relative_to(ROOT / "farm").parts[0].removesuffix(".py") for p in _files("farm")}
    assert rooms - {"_migrations"} <= set(HEIGHT)


@pytest.mark.parametrize("path", _files("workers/engines"), ids=lambda p: str(p.relative_to(ROOT)))
def test_an_engine_knows_nothing_of_queue_sql_or_storage(path: Path) -> None:
    for name in _imports(path):
        if name.startswith(("farm", "workers")):
            assert any(name == ok or name.startswith(f"{ok}.") for ok in ENGINE_MAY), name


def test_only_one_room_each_knows_celery_and_boto3() -> None:
    for path in _files("farm"):
        tops = {name.split(".")[0] for name in _imports(path)}
        inside = path.relative_to(ROOT).as_posix()
        if tops & {"celery", "kombu"}:
            assert inside == "farm/broker.py"
        if tops & {"boto3", "botocore"}:
            assert inside.startswith("farm/blobs/s3")


def test_only_store_jobs_writes_states() -> None:
    for path in (*_files("farm"), *_files("workers")):
        text = path.read_text(encoding="utf-8")
        if "update(jobs)" in text or "jobs.update()" in text:
            assert path.relative_to(ROOT).as_posix() == "farm/store/jobs.py"


def test_the_base_needs_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys; import farm.service, farm.cli, farm.dispatcher; from farm import Farm; "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'workers', 'celery.worker'}; "
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
