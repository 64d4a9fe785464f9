"""The Celery worker of one lane: `python -m workers --model M --engine E [--device D]`."""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.exceptions import CPendingDeprecationWarning
from celery.platforms import SecurityWarning
from celery.worker import state as celery_state

from farm import logs
from farm.blobs.aside import aside
from farm.broker import TASK
from farm.catalog import Catalog, Lane, load_catalog
from farm.config import load_settings
from farm.errors import DatabaseUnavailable, FarmError, InvalidConfig
from farm.provenance import open_signer
from farm.service import Farm
from farm.units import GB, parse_size
from workers.child import Child
from workers.engine import EngineConfig
from workers.runner import Runner, hard_stop
from workers.watchdog import Watchdog

log = logging.getLogger("farm.worker")
SELDOM_S = 60.0
HARD_STOP_S = 8.0  # after the grace: whatever hangs, the process ends


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("farm worker", description="Serve one lane.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="most pictures rendered at once; forgets what a lack of memory taught",
    )
    parser.add_argument("--strict", action="store_true", help="same bytes whatever the neighbours")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--memory-limit", metavar="SIZE", help="such as 8GB; default: all there is")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean drain, 1 when the engine cannot run."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Celery takes over
    try:
        with aside(Path(tempfile.gettempdir()), "farm-worker-") as folder:
            return _serve(args, folder / "engine.log")
    except FarmError as error:
        print(f"error: {error.message} ({error.code})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _serve(args: argparse.Namespace, engine_log: Path) -> int:
    settings = load_settings()
    lane = Lane(args.model, args.engine)
    logs.begin(settings.log_level, settings.log_format, role="worker", lane=":".join(lane))
    logging.getLogger("celery").setLevel(max(logging.WARNING, logging.root.level))
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_Seldom())
    catalog = load_catalog(settings.catalog_path, settings.models_path)
    weights, need = catalog.weights(lane), catalog.get(lane.model).memory_gb
    config = EngineConfig(
        engine=lane.engine,
        model=lane.model,
        weights=weights,
        device=args.device,
        micro_batch=args.micro_batch,
        strict=args.strict,
        threads=args.threads or weights.threads,
        loras=_lora_files(catalog, lane.model),
        memory_limit=parse_size(args.memory_limit) if args.memory_limit else None,
        needs_memory=None if need is None else int(need * GB),
    )
    signer = open_signer(settings)
    if signer:
        log.info("pictures are signed by %s until %s", signer.name, signer.until.date())
    farm = Farm(settings)
    _await_schema(farm)
    child = Child(
        config,
        load_timeout_s=settings.load_timeout_s,
        step_timeout_s=settings.step_timeout_s,
        decode_timeout_s=settings.decode_timeout_s,
        log=engine_log,
    )
    runner = Runner(config, child, settings, farm.db, farm.broker, farm.blobs, signer)

    def again() -> None:
        """The same worker anew, in this process: same pid, same parent, same arguments."""
        try:
            runner.close()
            farm.close()
        finally:  # a worker that is half closed would serve nobody, and not end
            if runner.is_asked_to_stop:
                os._exit(0)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves

    info = runner.start()
    log.info("%s loaded on %s, micro-batches of %d", lane.model, info.device, info.micro_batch)
    try:
        return _consume(farm, lane, runner, again)
    finally:
        runner.close()
        farm.close()


def _lora_files(catalog: Catalog, model: str) -> dict[str, Path]:
    """The files of the model's LoRAs; raises InvalidConfig for one that is not on this machine."""
    files = {}
    for name, lora in catalog.loras_for(model).items():
        if lora.weights.path is None:
            raise InvalidConfig(f"LoRA {name} is not here; first: farm models fetch {name}")
        files[name] = lora.weights.path
    return files


def _await_schema(farm: Farm) -> None:
    """Raises InvalidConfig for a database of another schema; waits for one that is away."""
    wait = 0.5
    while True:
        try:
            return farm.check_schema()
        except DatabaseUnavailable as error:
            log.warning("%s; trying again", error.message)
            wait = min(wait * 2, 10.0)
            time.sleep(wait * random.uniform(0.5, 1.5))


def _consume(farm: Farm, lane: Lane, runner: Runner, again: Callable[[], None]) -> int:
    """Celery's consumer in this thread, the work in its one pool thread, or in the watchdog's."""

    def render(model: str, engine: str) -> None:
        if (model, engine) != lane:
            log.warning("a token of %s/%s on the queue of %s is dropped", model, engine, lane.queue)
            return
        watchdog.token()

    def work() -> None:
        runner.work()
        if runner.broken.is_set():
            celery_state.should_stop = 1

    def stop(**_: Any) -> None:
        watchdog.stop()
        end = threading.Timer(farm.settings.shutdown_grace_s + HARD_STOP_S, hard_stop)
        end.daemon = True
        end.start()
        runner.stop()

    app = farm.broker.app
    app.task(render, name=TASK, ignore_result=True)
    signals.worker_shutting_down.connect(stop)
    signals.setup_logging.connect(_keep_logging)
    worker = _celery_worker(app, lane)
    watchdog = Watchdog(
        lane,
        farm.db,
        farm.broker,
        work=work,
        consumer=lambda: getattr(worker, "consumer", None),
        again=again,
    )
    watchdog.start()
    runner.ring()
    worker.start()
    watchdog.join()
    return 1 if runner.broken.is_set() else int(worker.exitcode or 0)


def _celery_worker(app: Celery, lane: Lane) -> Any:
    warnings.simplefilter("ignore", SecurityWarning)  # of root and pickle; ours is JSON only
    worker = app.Worker(
        queues=[lane.queue],
        pool="threads",
        concurrency=1,
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        quiet=True,
        optimization="fair",
    )
    # At each lost connection, though the setting is explicit; Celery has just switched it on.
    warnings.simplefilter("ignore", CPendingDeprecationWarning)
    return worker


class _Seldom(logging.Filter):
    """Lets the same line pass once in a while: Celery repeats itself while the broker is away."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text, now = str(record.msg)[:60], time.monotonic()
        if now - self._said.get(text, -SELDOM_S) < SELDOM_S:
            return False
        self._said[text] = now
        return True


def _keep_logging(**_: Any) -> None:
    """Celery leaves the logging that `_serve` set up alone."""
