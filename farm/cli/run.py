"""Running the farm: `farm up`, `worker`, `dispatcher`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import examples, log_service, options, settings
from farm.cli.output import hint, note
from farm.errors import DatabaseUnavailable, Invalid, InvalidConfig

if TYPE_CHECKING:
    from farm.catalog import Lane
    from farm.children import WorkerFlags
    from farm.config import Settings
    from farm.embedded import EmbeddedFarm

_PANEL = "The farm"

Device = Annotated[str | None, typer.Option("--device", "-d", help="Such as cuda, cuda:1 or cpu.")]
MicroBatch = Annotated[
    int | None, typer.Option("--micro-batch", min=1, max=256, help="Pictures rendered at once.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Same bytes whatever is rendered beside.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option("--memory-limit", metavar="SIZE", help="Of a worker, such as 8GB or 1.5GiB."),
]


def up(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME[:ENGINE]",
            help="A worker for this model; may be given several times. Default: shapes.",
        ),
    ] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Start no worker.")] = False,
    device: Device = None,
    micro_batch: MicroBatch = None,
    strict: Strict = False,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Start and supervise a whole farm on this machine; Ctrl-C stops it all.

    Needs no set-up: a database, a broker and a picture directory are made in
    home. What dies is started again. A second Ctrl-C does not wait for the
    pictures that are being rendered. Options of workers go to each of them.
    """
    from farm.catalog import load_catalog
    from farm.embedded import EmbeddedFarm
    from farm.engines import choose_lane

    conf = settings()
    catalog = load_catalog(conf.catalog_path, conf.models_path)
    lanes = [] if no_worker else [choose_lane(catalog, name) for name in models or ["shapes"]]
    flags = _flags(device, micro_batch, strict, threads, memory_limit)
    farm = EmbeddedFarm(conf, lanes, flags=flags, say=note)
    with _interruptible(farm):
        if farm.start():
            _ready(conf, [lane.model for lane in lanes])
            farm.run()
    note("stopped")
    if farm.failure is not None:
        raise farm.failure


def _ready(conf: Settings, models: list[str]) -> None:
    note("ready; Ctrl-C stops it")
    if models:
        prompt = "a red circle on a blue background" if "shapes" in models else "PROMPT"
        hint(f'next, in another terminal: farm submit "{prompt}" --model {models[0]} --wait')
    else:
        hint("next, in another terminal: farm worker --model M --engine E")
    hint(f"logs: {conf.home.resolve() / 'logs'}")


class _interruptible:
    """The first SIGINT or SIGTERM asks the farm to stop, a second one kills it."""

    def __init__(self, farm: EmbeddedFarm) -> None:
        self._farm = farm
        self._asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signals.append(signal.SIGHUP)
        self._before = {signum: signal.signal(signum, self._on_signal) for signum in signals}

    def __exit__(self, *exc: object) -> None:
        self._farm.stop()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._asked += 1
        if self._asked == 1:
            os.write(2, b"\nstopping; pictures being rendered are finished (again: at once)\n")
            self._farm.halt()
        else:
            self._farm.kill()


def worker(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME[:ENGINE]",
            help="See `farm models`; with --auto one to choose from, can be repeated.",
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", "-e", help="Default: the first that is installed.")
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Choose the model by what waits, again and again."),
    ] = False,
    device: Device = None,
    micro_batch: MicroBatch = None,
    strict: Strict = False,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Serve one model on one engine until SIGTERM or Ctrl-C; finishes what it renders.

    Start one on each machine or device; all need the same database, broker and
    picture store. With --auto it loads another model where more work waits, one
    at a time; no model that somebody wants waits for ever.
    """
    from farm.catalog import load_catalog
    from farm.children import worker_command
    from farm.engines import choose_lane, lanes_here

    conf = settings()
    catalog = load_catalog(conf.catalog_path, conf.models_path)
    if importlib.util.find_spec("workers") is None:
        raise InvalidConfig("this installation has no worker: pip install renderfarm")
    flags = _flags(device, micro_batch, strict, threads, memory_limit)
    if auto:
        _run_auto(conf, lanes_here(catalog, models or [], engine), flags)
        return
    if len(models or []) != 1:
        raise Invalid("--model: give one, or --auto")
    name = (models or [])[0]
    argv = worker_command(choose_lane(catalog, f"{name}:{engine}" if engine else name), flags)
    env = os.environ | ({"FARM_HOME": str(conf.home.absolute())} if options.home else {})
    sys.stdout.flush()
    os.execve(sys.executable, argv, env)  # noqa: S606


def _run_auto(conf: Settings, lanes: list[Lane], flags: WorkerFlags) -> None:
    from farm.auto import AutoWorker

    log_service(conf, "auto")
    stop = _stop_on_signals()
    note(f"choosing from {', '.join(f'{model}:{engine}' for model, engine in lanes)}")
    AutoWorker(conf, lanes, flags, say=note).run(stop)


def _stop_on_signals() -> threading.Event:
    """What SIGINT and SIGTERM set, by a thread: the main one may just then hold its lock."""
    stop = threading.Event()
    read, write = os.pipe()

    def wait() -> None:
        os.read(read, 1)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: os.write(write, b"."))
    return stop


def _flags(
    device: str | None,
    micro_batch: int | None,
    strict: bool,
    threads: int | None,
    memory_limit: str | None,
) -> WorkerFlags:
    from farm.children import WorkerFlags
    from farm.units import parse_size

    limit = parse_size(memory_limit) if memory_limit else None
    return WorkerFlags(device, micro_batch, strict, threads, limit)


def dispatcher() -> None:
    """Hand out work: rings workers, takes back what lost ones held. `farm up` includes it.

    One is enough; of several one leads, and another takes over when it falls silent.
    It waits while the database or the broker is away.
    """
    from farm.dispatcher import run_dispatcher
    from farm.service import Farm

    conf = settings()
    log_service(conf, "dispatcher")
    stop = _stop_on_signals()
    with Farm(conf) as farm:
        _await_schema(farm, stop)
        note("dispatching")
        run_dispatcher(farm.db, farm.broker, conf, stop, lambda: farm.blobs)


def _await_schema(farm: Any, stop: threading.Event) -> None:
    told = False
    while not stop.is_set():
        try:
            farm.check_schema()
            return
        except DatabaseUnavailable as error:
            if not told:
                note(f"{error.message}; waiting until it is back")
            told = True
            stop.wait(2)


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command(
        rich_help_panel=_PANEL,
        epilog=examples(
            "farm up",
            "farm up --model sdxl-base --model shapes:diffusers",
            "farm up --model klein:diffusers --model klein:sdcpp --memory-limit 12GB",
            "farm --home /data/farm up --no-worker",
        ),
    )(up)
    app.command(
        rich_help_panel=_PANEL,
        epilog=examples(
            "farm worker --model shapes --engine diffusers",
            "farm worker --model sdxl-base --engine diffusers --device cuda:1 --micro-batch 8",
            "farm worker --auto --device cuda:0",
        ),
    )(worker)
    app.command(rich_help_panel=_PANEL, epilog=examples("farm dispatcher", "farm -v dispatcher"))(
        dispatcher
    )
