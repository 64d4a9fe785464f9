"""A farm with one worker's runner in this very process: no broker, no dispatcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from farm.catalog import Lane
from farm.config import Settings
from farm.provenance import open_signer
from farm.service import Farm
from farm.store import schema
from farm.store.batches import BatchStatus
from tests.farm_kit import FAKES
from workers.child import Child
from workers.engine import EngineConfig
from workers.runner import Runner

LANE = Lane("fake-fast", "fake")


class NoBroker:
    """Rings nobody."""

    def length(self, lane: Lane) -> int:
        return 0

    def publish(self, lane: Lane, n: int) -> None:
        pass

    def ping(self) -> str:
        return "no broker"

    def close(self) -> None:
        pass


class LoneRunner(AbstractContextManager["LoneRunner"]):
    """`work` renders all that its lane has. A large time to live, so that nothing expires."""

    def __init__(self, home: Path, *, lane: Lane = LANE, models: str = FAKES, **told: Any) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "models.toml").write_text(models, encoding="utf-8")
        told = {"home": home, "models_file": home / "models.toml", "session_ttl_s": 60.0, **told}
        self.settings = Settings(**told)
        self.farm = Farm(self.settings)
        self.farm.__dict__["broker"] = NoBroker()
        schema.upgrade(self.farm.db)
        weights = self.farm.catalog.weights(lane)
        config = EngineConfig(lane.engine, lane.model, weights, micro_batch=weights.micro_batch)
        child = Child(config, log=home / "child.log")
        broker: Any = self.farm.broker
        signer = open_signer(self.settings)
        self.runner = Runner(
            config, child, self.settings, self.farm.db, broker, self.farm.blobs, signer
        )
        self.runner.start()

    @property
    def rendered(self) -> int:
        """Pictures that its engine has made so far."""
        return self.runner._rendered

    def work(self, batch: BatchStatus, timeout_s: float = 60.0) -> BatchStatus:
        """Work until the batch is done, as a token comes again for what went back."""
        for status in self.farm.watch(batch.id, poll_s=0.05):
            if status.done:
                return status
            assert time.time() < batch.created_at + timeout_s, status
            self.runner.work()
        raise AssertionError("watch ends with a finished batch")

    @contextmanager
    def working(self) -> Iterator[LoneRunner]:
        """It works on and on in a thread."""
        over = threading.Event()

        def work() -> None:
            while not over.wait(0.02):
                self.runner.work()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            self.runner.stop()
            thread.join(30)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.runner.close()
        self.farm.close()
