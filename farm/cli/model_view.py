"""What `farm models list` and `show` tell of models and LoRAs."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any

from farm.catalog import LORA, Lane, LoraEntry, ModelEntry, Weights, local_path
from farm.cli.output import Cell, clean, print_fields, print_json, print_line, print_table
from farm.cli.weights import catalog_of
from farm.config import Settings
from farm.models.verify import locked_size
from farm.units import show_size

Entry = ModelEntry | LoraEntry
Field = tuple[str, Cell]
States = dict[str, dict[str, Any]]
"""Engine, or LORA -> `state` (fetched, local, missing, not fetched), `path` and `bytes`."""
_LOADING = {"variant", "dtype", "micro_batch", "threads", "options", "allow_pickle", "files"}


def show_all(conf: Settings, as_json: bool) -> None:
    """All models, and below them all LoRAs."""
    catalog = catalog_of(conf)
    found = [(name, catalog.entry(name)) for name in sorted({**catalog.models, **catalog.loras})]
    if as_json:
        print_json([_as_dict(conf, name, entry) for name, entry in found])
        return
    models, loras = [], []
    for name, entry in found:
        state = _in_words(_states(conf, name, entry))
        if isinstance(entry, LoraEntry):
            fits = ", ".join(entry.models)
            loras.append((name, state, fits, entry.licence, entry.description))
            continue
        size = f"{entry.defaults.width}x{entry.defaults.height}"
        steps = entry.defaults.steps
        models.append((name, state, size, steps, entry.licence, entry.description))
    print_table(("model", "engines", "size", "steps", "licence", "description"), models)
    if loras:
        print_line("")
        print_table(("LoRA", "weights", "for", "licence", "description"), loras)


def show(conf: Settings, name: str, as_json: bool) -> None:
    """All of one model or LoRA. Raises UnknownModel."""
    catalog = catalog_of(conf)
    entry = catalog.entry(name)
    told = _as_dict(conf, name, entry)
    fitting = {} if isinstance(entry, LoraEntry) else catalog.loras_for(name)
    loras = {lora: _in_words(_states(conf, lora, fitting[lora])) for lora in sorted(fitting)}
    if as_json:
        print_json(told | ({} if isinstance(entry, LoraEntry) else {"loras": loras}))
        return
    fields = [*_about(name, entry), *_limits(entry), *_here(entry, told["weights"])]
    fields.append(("LoRAs", ", ".join(f"{lora} ({state})" for lora, state in loras.items())))
    _print_wrapped(fields)


def _as_dict(conf: Settings, name: str, entry: Entry) -> dict[str, Any]:
    """The entry as JSON; `weights`: what is on this machine, by engine."""
    told = entry.model_dump(mode="json")
    if isinstance(entry, LoraEntry):
        told["source"] = told.pop("weights")
    kind = "lora" if isinstance(entry, LoraEntry) else "model"
    return {"name": name, "kind": kind, **told, "weights": _states(conf, name, entry)}


def _sources(entry: Entry) -> dict[str, Weights]:
    """Engine (LORA for a LoRA) -> its weights as the catalogue has them."""
    if isinstance(entry, LoraEntry):
        return {LORA: entry.weights}
    return {str(engine): weights for engine, weights in entry.engines.items()}


def _states(conf: Settings, name: str, entry: Entry) -> States:
    """Whether the weights are here, where, and their bytes as far as the lock knows them."""
    told: States = {}
    for engine, weights in _sources(entry).items():
        lane = Lane(name, engine)
        path = weights.path or local_path(conf.models_path, lane, weights)
        if weights.path:
            state = "local" if weights.path.exists() else "missing"
        else:
            state = "fetched" if path else "not fetched"
        size = locked_size(conf, lane, weights) or None
        told[engine] = {"state": state, "path": str(path) if path else None, "bytes": size}
    return told


def _in_words(states: States) -> str:
    if LORA in states:
        return str(states[LORA]["state"])
    return ", ".join(f"{engine} ({told['state']})" for engine, told in states.items())


def _about(name: str, entry: Entry) -> list[Field]:
    return [
        ("LoRA" if isinstance(entry, LoraEntry) else "model", name),
        ("description", entry.description),
        ("licence", ", ".join(filter(None, (entry.licence, entry.licence_url)))),
        ("terms", entry.terms),
        ("attribution", entry.attribution),
    ]


def _limits(entry: Entry) -> list[Field]:
    if isinstance(entry, LoraEntry):
        return [("fits", ", ".join(entry.models))]
    told = entry.defaults
    defaults = f"{told.width}x{told.height}, {told.steps} steps, guidance {told.guidance_scale:g}"
    steps = f"{entry.min_steps} to {entry.max_steps} steps"
    guidance = f"guidance {entry.min_guidance:g} to {entry.max_guidance:g}"
    need = "not told; as a rule more than its files have"
    if entry.memory_gb:
        need = f"{entry.memory_gb:g} GB of the device"
    return [
        ("family", entry.family),
        ("defaults", defaults + (f", {told.scheduler}" if told.scheduler else "")),
        ("limits", f"sides to {entry.max_side}, {steps}, {guidance}"),
        ("sizes", ", ".join(entry.sizes)),
        ("schedulers", ", ".join(entry.schedulers)),
        ("memory", need),
    ]


def _here(entry: Entry, states: States) -> list[Field]:
    """Each engine's weights: are they here, where from, how they are loaded."""
    fields: list[Field] = []
    for engine, weights in _sources(entry).items():
        told = states[engine]
        size = f", {show_size(told['bytes'])}" if told["bytes"] else ""
        origin = weights.url or ""
        if weights.repo:
            origin = f"{weights.repo} at {weights.revision or 'main'}"
        loads = weights.model_dump(mode="json", include=_LOADING, exclude_defaults=True)
        fields += [
            ("weights" if engine == LORA else engine, f"{told['state']}{size}"),
            ("  path", told["path"] or ""),
            ("  from", origin),
            ("  loads with", ", ".join(f"{key} {value}" for key, value in _flat(loads))),
        ]
    return fields


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [
        pair
        for key, item in value.items()
        for pair in _flat(item, f"{prefix}.{key}" if prefix else key)
    ]


def _print_wrapped(fields: list[Field]) -> None:
    """As print_fields; on a terminal, long texts go on below their beginning."""
    if not sys.stdout.isatty():
        print_fields(fields)
        return
    shown = [(name, clean(value)) for name, value in fields if value not in (None, "")]
    width = max(len(name) for name, _ in shown) + 2
    room = max(20, shutil.get_terminal_size().columns - width)
    for name, value in shown:
        lines = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False)
        print_line(name.ljust(width) + ("\n" + " " * width).join(lines))
