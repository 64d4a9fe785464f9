"""What the README shows works as it stands there, on the demo model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.farm_kit import ROOT, until

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.S)
    assert found, f"the README has no block {name}"
    return found[1]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("FARM_")}
    path = f"{Path(sys.executable).parent}:{plain['PATH']}"
    return plain | {"PATH": path, "FARM_HOME": str(tmp_path / "home")}


@pytest.fixture
def up(tmp_path: Path, env: dict[str, str]) -> Iterator[None]:
    with (tmp_path / "up.log").open("wb") as log:
        farm = subprocess.Popen(block("up").split(), env=env, stderr=log, stdout=log, cwd=tmp_path)
    try:
        told = lambda: (tmp_path / "up.log").read_text()  # noqa: E731
        until(lambda: "ready" in told() or farm.poll() is not None, 120)
        assert farm.poll() is None, told()
        yield
        farm.send_signal(signal.SIGINT)
        assert farm.wait(60) in (0, 130), told()
    finally:
        farm.kill()
        farm.wait(30)


def test_daily_commands_and_python(tmp_path: Path, env: dict[str, str], up: None) -> None:
    done = subprocess.run(
        ["bash", "-euxc", block("daily")], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert len(list((tmp_path / "pictures" / "tonight").glob("*.png"))) == 8
    assert (tmp_path / "tonight.png").stat().st_size > 1000
    done = subprocess.run(
        ["bash", "-euxc", block("many")], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 jobs: 200 of shapes" in done.stdout
    assert "queued 200 jobs" in done.stderr
    done = subprocess.run(
        ["bash", "-euxc", block("dataset")], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "published" / "webdataset" / "train-00000.tar").is_file()
    python = tmp_path / "python"
    python.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=python, env=env, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "'succeeded': 4" in done.stdout, done.stdout + done.stderr
    assert len(list((python / "pictures").glob("*.png"))) == 4


def test_the_demo(tmp_path: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "farm.demo.run", "--home", str(tmp_path / "demo")],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "demo").rglob("pictures/*/*.png"))) >= 24


def test_the_two_commands_and_every_farm_command_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:.*## ", makefile, re.M), target
    for command in set(re.findall(r"^farm ([a-z]+)", README, re.M)):
        shown = subprocess.run(
            [sys.executable, "-m", "farm", command, "--help"], capture_output=True, text=True,
            check=False, timeout=30,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert "Example" in shown.stdout


def test_settings_named_in_the_readme_exist() -> None:
    from farm.config import Settings

    known = {f"FARM_{name.upper()}" for name in Settings.model_fields} | {"FARM_SECRETS_DIR"}
    assert set(re.findall(r"FARM_[A-Z0-9_]+", README)) <= known
