"""A worker that signs: every picture that it stores verifies, and nothing tells its key."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.errors import StorageUnavailable
from farm.provenance import Authority, read_anchors, read_mark
from farm.store.tables import metadata
from tests.cli_kit import command_line
from tests.farm_kit import FAKES, ROOT
from tests.provenance_kit import exiftool, issue, own_authority, secret_lines, settings_of
from tests.runner_kit import LoneRunner
from tests.servers import poll

ROWS = [
    {"prompt": f"a red circle {n} 🟥", "seed": n, "model": "fake-fast", "format": form}
    for n, form in enumerate(("png", "webp", "jpeg") * 4)
]


@pytest.fixture
def made(tmp_path: Path) -> Authority:
    return own_authority(tmp_path)


@pytest.fixture
def lone(tmp_path: Path, made: Authority) -> Iterator[LoneRunner]:
    with LoneRunner(tmp_path / "home", **settings_of(made)) as lone:
        yield lone


def test_every_picture_is_signed_and_its_hash_is_of_what_was_signed(
    lone: LoneRunner, made: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    batch = lone.work(lone.farm.submit(ROWS))
    anchors = read_anchors(made.anchors)
    for job in lone.farm.pictures(batch.id):
        data = lone.farm.fetch(job)  # compared with the recorded SHA-256
        assert len(data) == job.size_bytes
        mark = read_mark(data, anchors)
        assert (mark.c2pa, mark.fault, mark.title) == ("trusted", "", job.id)
        assert (mark.parameters or "").startswith(job.spec["prompt"])
    paths = list((tmp_path / "home" / "blobs").rglob(f"{batch.id}/*.*"))
    assert {path.suffix for path in paths} == {".png", ".webp", ".jpg"}
    for suffix in (".png", ".webp", ".jpg"):
        told = exiftool(next(path for path in paths if path.suffix == suffix))
        assert told["XMP:DigitalSourceType"] == mark.source_type

    again = lone.work(lone.farm.submit(ROWS))
    for old, new in zip(lone.farm.jobs(batch.id), lone.farm.jobs(again.id), strict=True):
        assert (old.object_key, old.sha256) == (new.object_key, new.sha256), "it is linked"

    with command_line(tmp_path / "home", monkeypatch, capsys) as farm:
        code, out, _ = farm("provenance", "verify", batch.id, "--trust", made.anchors)
        assert (code, out.count("trusted, signed by")) == (0, len(ROWS)), out
        code, out, _ = farm("provenance", "show", f"{batch.id}/2")
        assert (code, "picture             " + f"{batch.id}/2" in out) == (0, True)
        paths[0].write_bytes(paths[1].read_bytes())
        code, out, _ = farm("provenance", "verify", batch.id, "--trust", made.anchors)
        assert (code, out.count("is not the picture that was recorded")) == (1, 1)

    seen = [caplog.text, *(p.read_text("utf-8", "replace") for p in tmp_path.rglob("*.log"))]
    with lone.farm.db.read() as connection:
        seen += [
            str(connection.execute(table.select()).all()) for table in metadata.tables.values()
        ]
    assert len(seen) > 3
    for secret in secret_lines(made.key):
        assert not [text for text in seen if secret in text]


def test_a_picture_in_the_spool_is_signed_already(
    lone: LoneRunner, made: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, away = lone.farm.blobs.put, 3
    signer = lone.runner._signer
    assert signer
    sign, signs = signer.sign, 0

    def count(*args: Any, **how: Any) -> bytes:
        nonlocal signs
        signs += 1
        return sign(*args, **how)

    def fail_first(*args: Any) -> None:
        nonlocal away
        if away:
            away -= 1
            raise StorageUnavailable("the store is away")
        put(*args)

    monkeypatch.setattr(signer, "sign", count)
    monkeypatch.setattr(lone.farm.blobs, "put", fail_first)
    batch = lone.work(lone.farm.submit(ROWS))
    assert signs == lone.rendered == len(ROWS)
    anchors = read_anchors(made.anchors)
    for job in lone.farm.pictures(batch.id):
        assert read_mark(lone.farm.fetch(job), anchors).c2pa == "trusted"


def test_no_job_fails_when_the_certificate_expires(lone: LoneRunner) -> None:
    """What is under way goes back, no more is claimed, and the worker says why."""
    signer = lone.runner._signer
    assert signer
    batch = lone.farm.submit(ROWS[:1])
    (claim,) = lone.runner._claims.next(1)
    signer.until = datetime.now(UTC)
    lone.runner._keeper.keep(claim, np.zeros((64, 64, 3), np.uint8), 0.1)
    poll(lambda: lone.farm.status(batch.id).counts["queued"] == 1, "the job goes back", 30)
    (job,) = lone.farm.jobs(batch.id)
    assert job.failures == 0
    assert "expired on" in (job.error or "")
    assert lone.runner._keeper.claims_none == signer.trouble
    assert "put a new one in its place" in lone.runner._told().note


@pytest.mark.parametrize("fault", ["missing", "expired", "half"])
def test_a_worker_with_a_bad_certificate_says_so_and_ends(fault: str, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(FAKES)
    made = issue(tmp_path, days=-1 if fault == "expired" else 30)
    told = {
        "missing": "c2pa_certificate: there is no file",
        "expired": "expired on",
        "half": "set both or neither",
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("FARM_")}
    env |= {"FARM_HOME": str(tmp_path), "FARM_MODELS_FILE": str(tmp_path / "models.toml")}
    env |= {f"FARM_{name.upper()}": str(path) for name, path in settings_of(made).items()}
    if fault == "missing":
        made.certificate.unlink()
    if fault == "half":
        del env["FARM_C2PA_KEY"]
    done = subprocess.run(
        [sys.executable, "-m", "workers", "--model", "fake-one", "--engine", "fake"],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told[fault] in line
    assert line.endswith("(ERR_INVALID_CONFIG)")
    assert not any(secret in done.stderr + done.stdout for secret in secret_lines(made.key))
