"""A quantised copy of a model, made once: a GGUF file and an entry of its own.

stable-diffusion.cpp does the work in a process of its own, `python -m workers.convert`, for its
native code may abort. The copy appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from farm.catalog import Catalog, ModelEntry, Weights, load_catalog
from farm.children import spawn
from farm.config import Settings
from farm.engines import check_engine
from farm.errors import EngineCrashed, Invalid, InvalidConfig, by_code
from farm.models.add import NewEntry, add
from farm.models.entry import check_free
from farm.models.place import alone_at
from farm.weight_files import WTYPES

TYPES = tuple(name for name in WTYPES if name != "default")
ENGINE = "sdcpp"


@dataclass(frozen=True)
class Converted:
    """`before` and `after`: bytes of the weights' file."""

    name: str
    source: str
    type: str
    path: Path
    before: int
    after: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def convert(
    settings: Settings,
    name: str,
    wtype: str,
    *,
    new: str | None = None,
    threads: int | None = None,
    begins: Callable[[Path], None] = lambda source: None,
) -> Converted:
    """Make the model `new` (default: NAME-TYPE) out of NAME, its weights of type `wtype`.

    `begins` is told the file that is read, once all is in order and the work begins.
    Raises Invalid for a type or a name that will not do, InvalidConfig when the weights of NAME
    are not one file on this machine, EnvironmentFault when the disk is too small, ModelNotLoaded
    for a broken file, EngineCrashed with the library's last words.
    """
    wtype = wtype.strip().lower()
    if wtype not in TYPES:
        raise Invalid(f"--type {wtype[:40]!r}: one of {', '.join(TYPES)}")
    check_engine(ENGINE)
    catalog = load_catalog(settings.catalog_path, settings.models_path)
    entry = catalog.get(name)
    weights, source = _source(catalog, name)
    new = new or f"{name}-{wtype}"
    place = settings.models_path.absolute() / new / ENGINE
    target = place / f"{new}.gguf"
    made = _entry(entry, new, weights, target)
    made.checked()
    check_free(settings, new)
    begins(source)
    place.mkdir(parents=True, exist_ok=True)
    with alone_at(place):
        for stray in place.glob(".*.part"):  # of a conversion that was killed
            stray.unlink()
        part = place / f".{new}.{os.getpid()}.part"
        try:
            options = ["--threads", threads] if threads else []
            told = _run(place / f".{new}.log", source, part, wtype, *options)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
            with suppress(OSError):  # it holds something
                place.rmdir()
    add(settings, made)
    return Converted(new, name, wtype, target, **told)


def _source(catalog: Catalog, name: str) -> tuple[Weights, Path]:
    """The one file with all parts of the model. Raises InvalidConfig when there is none."""
    engines = catalog.get(name).engines
    weights = engines.get("sdcpp") or engines.get("diffusers")
    if weights is None:
        raise InvalidConfig(f"model {name} has no weights that could be converted")
    if weights.path is None:
        raise InvalidConfig(f"the weights of {name} are not here; first: farm models fetch {name}")
    if not weights.path.exists():
        raise InvalidConfig(f"model {name}: there is no {weights.path}")
    if not weights.path.is_file():
        raise InvalidConfig(
            f"model {name}: {weights.path} is a directory; only a checkpoint of one file, "
            ".safetensors or .gguf, is converted: farm models add NAME -e sdcpp --path FILE"
        )
    return weights, weights.path


def _entry(entry: ModelEntry, new: str, weights: Weights, target: Path) -> NewEntry:
    """What holds of the model still: licence, family, defaults, limits; not its need of memory."""
    about = entry.model_dump(mode="json", exclude_defaults=True, exclude={"engines", "memory_gb"})
    kept: dict[str, Any] = {"path": str(target)}
    if weights is entry.engines.get("sdcpp"):
        kept |= {"threads": weights.threads, "options": _options(weights)}
    return NewEntry(new, ENGINE, kept, about)


def _options(weights: Weights) -> dict[str, Any]:
    """The engine's options, without the type; files beside the old one by their whole path."""
    folder = weights.path.parent if weights.path else Path()

    def moved(value: Any) -> Any:
        return (
            str(folder / value) if isinstance(value, str) and (folder / value).is_file() else value
        )

    return {name: moved(value) for name, value in weights.options.items() if name != "wtype"}


def _run(log: Path, *argv: object) -> dict[str, Any]:
    """The child's answer; it dies with this process. Raises what the child did."""
    log.unlink(missing_ok=True)
    child = spawn([sys.executable, "-m", "workers.convert", *map(str, argv)], log)
    try:
        code = child.wait()
    finally:
        child.kill()
    lines = log.read_text("utf-8", "replace").split("\n")
    log.unlink()
    last = [line for line in lines if line.strip()][-1:] or [""]
    try:
        told: dict[str, Any] = json.loads(last[0])
    except ValueError:
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        raise EngineCrashed(
            f"the conversion ended {how}; its last words: {last[0][:500]}"
        ) from None
    if code:
        raise by_code(told["code"], told["message"])
    return told
