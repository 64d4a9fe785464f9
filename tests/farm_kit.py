"""A whole farm of real processes for end-to-end tests, cleaned up always."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from farm.blobs import S3Options
from farm.broker import Broker
from farm.catalog import Lane
from farm.config import Settings
from farm.service import Farm
from farm.store import schema
from tests import servers

ROOT = Path(__file__).parents[1]
FAKES = """
[models.fake-one]
licence = "none"
defaults = { width = 64, height = 64, steps = 4 }
[models.fake-one.engines.fake]
micro_batch = 4
options = { seconds_per_step = 0.005 }

[models.fake-fast]
licence = "none"
defaults = { width = 64, height = 64, steps = 1 }
[models.fake-fast.engines.fake]
micro_batch = 32
options = { seconds_per_step = 0.0 }

[models.fake-slow]
licence = "none"
defaults = { width = 64, height = 64, steps = 20 }
[models.fake-slow.engines.fake]
options = { seconds_per_step = 0.1 }
"""


def until(ready: Callable[[], object], timeout_s: float) -> None:
    """Wait until `ready()` is true; a TimeoutError after `timeout_s` seconds."""
    servers.poll(lambda: bool(ready()), "what the test waits for", timeout_s)


class FarmKit:
    """Settings by environment, as a person would run it; `farm` is the client."""

    def __init__(
        self,
        home: Path,
        broker_url: str,
        *,
        database_url: str | None = None,
        blobs_url: str | None = None,
        s3: S3Options | None = None,
        models: str = FAKES,
        **settings: object,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "models.toml").write_text(models, encoding="utf-8")
        told = {
            "home": home, "models_file": home / "models.toml", "broker_url": broker_url,
            "database_url": database_url, "blobs_url": blobs_url, "tick_s": 0.2,
            "session_ttl_s": 4.0, "retry_delay_s": 0.1, **settings,
        }  # fmt: skip
        if s3:
            told |= {
                "s3_endpoint_url": s3.endpoint_url, "s3_access_key": s3.access_key,
                "s3_secret_key": s3.secret_key, "s3_region": s3.region,
            }  # fmt: skip
        told = {name: value for name, value in told.items() if value is not None}
        self.env = os.environ | {f"FARM_{name.upper()}": str(v) for name, v in told.items()}
        self.home = home
        self.farm = Farm(Settings(**told))  # type: ignore[arg-type]
        schema.upgrade(self.farm.db)
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, *args: str, name: str) -> subprocess.Popen[bytes]:
        """A process of the farm, its output in home/NAME.log."""
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *args], env=self.env, cwd=ROOT, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def dispatcher(self) -> subprocess.Popen[bytes]:
        return self.run("-m", "farm", "dispatcher", name="dispatcher")

    def worker(
        self, model: str = "fake-one", engine: str = "fake", *flags: str, wait_s: float = 180.0
    ) -> subprocess.Popen[bytes]:
        """A worker whose session is open."""
        args = ("--model", model, "--engine", engine, *flags)
        process = self.run("-m", "workers", *args, name=f"worker-{model}")
        if wait_s:
            until(lambda: process.pid in self.live() or process.poll() is not None, wait_s)
            assert process.poll() is None, self.log(f"worker-{model}")
        return process

    def live(self) -> set[int]:
        return {worker.pid for worker in self.farm.workers()}

    def tokens(self, model: str = "fake-one", engine: str = "fake") -> int:
        broker: Broker = self.farm.broker
        return broker.length(Lane(model, engine))

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")

    def assert_whole(self, batch_id: str, *, orphans: bool = False) -> None:
        """Every succeeded job has its object with its hash; soon no other is there.

        `orphans`: a worker that ended between storing and recording may have left some.
        """
        keys = set()
        for job in self.farm.pictures(batch_id):
            self.farm.fetch(job)
            keys.add(job.object_key)

        def stored() -> set[str]:
            return {blob.key for blob in self.farm.blobs.list(f"pictures/{batch_id}/")}

        until(lambda: stored() >= keys if orphans else stored() == keys, 30)

    def __enter__(self) -> FarmKit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.processes:
            process.wait(30)
        self.farm.close()
        if error:
            for path in sorted(self.home.glob("*.log")):
                print(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")


def engine_child(worker: subprocess.Popen[bytes]) -> psutil.Process:
    """The engine's process of a worker."""
    children = [
        child
        for child in psutil.Process(worker.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(children) == 1, children
    return children[0]
