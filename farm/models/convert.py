"""A quantised copy of a model, made once: a GGUF file and an entry of its own.

stable-diffusion.cpp does the work in a process of its own, `python -m workers.convert`, for its
native code may abort. The copy appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farm.catalog import Catalog, ModelEntry, Weights, load_catalog
from farm.children import spawn
from farm.config import Settings
from farm.engines import check_engine
from farm.errors import EngineCrashed, Invalid, InvalidConfig, by_code
from farm.models.add import NewEntry, add
from farm.models.entry import check_free
from farm.models.place import alone_at, check_space
from farm.weight_files import WTYPES

TYPES = tuple(name for name in WTYPES if name != "default")
ENGINE = "sdcpp"
MODEL = "model"
LARGE = ("diffusion_model", "llm", "t5xxl")
"""The parts of a model in parts that are worth it; the others are small, and suffer more."""


@dataclass(frozen=True)
class Converted:
    """`path`: the checkpoint, or the directory of the parts; `before`, `after`: bytes of all."""

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
    begins: Callable[..., None] = lambda *files: None,
) -> Converted:
    """Make the model `new` (default: NAME-TYPE) out of NAME, its weights of type `wtype`.

    `begins` is told the files that are read, once all is in order and the work begins.
    Raises Invalid for a type or a name that will not do, InvalidConfig when the weights of NAME
    are not here or a pipeline's, EnvironmentFault when the disk is too small, ModelNotLoaded
    for a broken file, EngineCrashed with the library's last words.
    """
    wtype = wtype.strip().lower()
    if wtype not in TYPES:
        raise Invalid(f"--type {wtype[:40]!r}: one of {', '.join(TYPES)}")
    check_engine(ENGINE)
    catalog = load_catalog(settings.catalog_path, settings.models_path)
    entry = catalog.get(name)
    source = _source(catalog, name)
    new = new or f"{name}-{wtype}"
    place = settings.models_path / new / ENGINE
    made = NewEntry(new, ENGINE, {"path": str(place)}, _about(entry))
    made.checked()
    check_free(settings, new)
    begins(*source.large.values())
    place.parent.mkdir(parents=True, exist_ok=True)
    with alone_at(place):
        staging = place.with_name(f".{ENGINE}.converting")
        shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
        try:
            staging.mkdir()
            begun = time.monotonic()
            names = _fill(staging, source, new, wtype, threads)
            sizes = source.size, sum(file.stat().st_size for file in staging.iterdir())
            shutil.rmtree(place, ignore_errors=True)  # of no model: its name was free
            os.replace(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    made = replace(made, weights=source.entry_weights(place, names))
    add(settings, made)
    seconds = round(time.monotonic() - begun, 2)
    return Converted(new, name, wtype, Path(made.weights["path"]), *sizes, seconds)


@dataclass(frozen=True)
class _Source:
    """`large`: the files that are converted, by the option that names them; a whole checkpoint's
    is MODEL. `rest`: parts that stay as they are, for they are small and lose most."""

    weights: Weights
    large: dict[str, Path]
    rest: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in (*self.large.values(), *self.rest.values()))

    def entry_weights(self, place: Path, names: dict[str, str]) -> dict[str, Any]:
        """The copy's weights in models.toml; `names`: of its files."""
        options = {**self.weights.options, **names}
        options.pop("wtype", None)
        name = options.pop(MODEL, None)
        path = place / name if name else place
        return {"path": str(path), "threads": self.weights.threads, "options": options}


def _source(catalog: Catalog, name: str) -> _Source:
    """The files of a model. Raises InvalidConfig when they are not here, or a pipeline's."""
    engines = catalog.get(name).engines
    weights = engines.get("sdcpp") or engines.get("diffusers")
    if weights is None:
        raise InvalidConfig(f"model {name} has no weights that could be converted")
    path = weights.path
    if path is None:
        raise InvalidConfig(f"the weights of {name} are not here; first: farm models fetch {name}")
    if not path.exists():
        raise InvalidConfig(f"model {name}: there is no {path}")
    if "sdcpp" not in engines:
        weights = Weights(path=path)
    folder = path if path.is_dir() else path.parent
    options = [(name, value) for name, value in weights.options.items() if isinstance(value, str)]
    parts = {name: folder / value for name, value in options if (folder / value).is_file()}
    large = {part: parts.pop(part) for part in LARGE if part in parts}
    if path.is_file():
        large[MODEL] = path
    if not large:
        raise InvalidConfig(
            f"model {name}: {path} is a directory of a pipeline; only a checkpoint of one file, "
            ".safetensors or .gguf, is converted: farm models add NAME -e sdcpp --path FILE"
        )
    return _Source(weights, large, parts)


def _about(entry: ModelEntry) -> dict[str, Any]:
    """What holds of the copy too: licence, family, defaults, limits; not the need of memory."""
    about = entry.model_dump(mode="json", exclude_defaults=True, exclude={"engines", "memory_gb"})
    return {**about, "defaults": entry.defaults.model_dump(mode="json", exclude_none=True)}


def _fill(
    staging: Path, source: _Source, new: str, wtype: str, threads: int | None
) -> dict[str, str]:
    """Make all files of the copy; their names. Raises InvalidConfig if nothing would change."""
    names, same, reasons = {}, dict(source.rest), []
    for part, file in source.large.items():
        target = staging / f"{new if part == MODEL else part}.gguf"
        options = ["--threads", threads] if threads else []
        options += ["--part"] if part != MODEL else []
        told = _run(staging / ".log", file, target, wtype, *options)
        if why := told.get("unchanged"):
            reasons.append(f"{file}: {why}")
            target.unlink(missing_ok=True)
            same[part] = file
        else:
            names[part] = target.name
    if not names:
        raise InvalidConfig("; ".join(reasons))
    for part, file in same.items():
        names[part] = f"{new if part == MODEL else part}{file.suffix}"
        _same(file, staging / names[part])
    return names


def _same(file: Path, target: Path) -> None:
    """The same file under another name, a copy where there can be no link."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        check_space(target, file.stat().st_size)
        shutil.copyfile(file, target)


def _run(log: Path, *argv: object) -> dict[str, Any]:
    """The child's answer; it dies with this process. Raises what the child did."""
    log.unlink(missing_ok=True)
    child = spawn([sys.executable, "-m", "workers.convert", *map(str, argv)], log)
    try:
        code = child.wait()
    finally:
        child.kill()
        child.wait()
    lines = log.read_text("utf-8", "replace").split("\n")
    log.unlink()
    last = next((line for line in reversed(lines) if line.strip()), "")
    if code not in (0, 1) or not last.startswith("{"):
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        raise EngineCrashed(f"the conversion ended {how}; its last words: {last[:500]}")
    told: dict[str, Any] = json.loads(last)
    if code:
        raise by_code(told["code"], told["message"])
    return told
