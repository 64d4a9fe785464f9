"""What the API's page shows works as it stands there: plain curl, and the Python client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.farm_kit import ROOT, FarmKit, until

PAGE = (ROOT / "farm" / "http" / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", PAGE, re.S)
    assert found, f"the page has no block {name}"
    return found[1]


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[FarmKit]:
    with FarmKit(tmp_path / "home", redis_url) as kit:
        kit.dispatcher()
        kit.worker("shapes", "diffusers")
        yield kit


@pytest.fixture
def served(kit: FarmKit) -> tuple[str, dict[str, str]]:
    """Where `farm serve` listens on every address, and an environment with a token for it."""
    farm = [sys.executable, "-m", "farm"]
    made = subprocess.run(
        [*farm, "token", "create", "test", "--scope", "admin"], env=kit.env, cwd=ROOT, check=True,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    server = kit.run("-m", "farm", "serve", "--host", "0.0.0.0", "--port", "0", name="serve")
    until(lambda: "serving" in kit.log("serve") or server.poll() is not None, 60)
    found = re.search(r"http://0\.0\.0\.0:(\d+)", kit.log("serve"))
    assert found, kit.log("serve")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = kit.env | {"FARM_TOKEN": made.stdout.strip(), "PATH": path}
    return f"http://127.0.0.1:{found[1]}", env


def test_the_page(kit: FarmKit, served: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    url, env = served
    there = tmp_path / "there"
    there.mkdir()
    script = block("curl").replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=there, env=env, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(there.glob("*.png"))) == 2
    assert '"succeeded":2' in done.stdout
    assert "event: done" in done.stdout
    assert "farm_jobs{" in done.stdout
    assert "shapes" in done.stdout
    assert {batch.name for batch in kit.farm.batches()} == {"tonight", "stars", "prompts.jsonl"}
    code = block("client").replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=there, env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "'succeeded': 4" in done.stdout, done.stdout + done.stderr
    assert len(list((there / "pictures").glob("*.png"))) == 4
    server = kit.processes[-1]
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0, kit.log("serve")
    secret = env["FARM_TOKEN"].rpartition("_")[2]
    assert secret not in kit.log("serve")
