"""Entries of models.toml: appended as text, so that nothing that stands there is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from farm.catalog import DEMO, load_catalog, parsed
from farm.config import Settings
from farm.errors import Invalid, InvalidConfig
from farm.faults import unreadable
from farm.models.lock import alone, write_whole

Kind = Literal["models", "loras"]


def catalog_file(settings: Settings) -> Path:
    """The models.toml in force, or where the first entry begins one."""
    return settings.catalog_path or settings.home / "models.toml"


def append_entry(settings: Settings, kind: Kind, name: str, entry: Mapping[str, Any]) -> Path:
    """Append an entry, or to a model that is there the engines it has not; the models.toml.

    `entry`: what the TOML shall say, nothing checked yet. Raises Invalid when the name is taken,
    InvalidConfig when the file would not be read again.
    """
    path = catalog_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        text = _read(path)
        if extends(settings, name, entry.get("engines", {})):
            entry = {"engines": entry["engines"]}
        text += ("" if not text or text.endswith("\n") else "\n") + ("\n" if text else "")
        text += entry_text(kind, name, entry)
        try:
            text.encode("utf-8")
            parsed(text, path)
        except (UnicodeEncodeError, InvalidConfig) as error:
            raise InvalidConfig(
                f"the table [{kind}.{name}] cannot be appended to {path}: {error}; add it by hand"
            ) from None
        write_whole(path, text)
    return path


def extends(settings: Settings, name: str, engines: Iterable[str]) -> bool:
    """Whether there is such a model, of the file, and these engines are new to it.

    Raises Invalid when the name is taken otherwise.
    """
    model = load_catalog(settings.catalog_path).models.get(name, DEMO)
    if model is not DEMO and engines and not set(engines) & set(model.engines):
        return True
    check_free(settings, name)
    return False


def check_free(settings: Settings, name: str) -> None:
    """Raises Invalid when a model or a LoRA has the name."""
    catalog = load_catalog(settings.catalog_path)
    if name in {**catalog.models, **catalog.loras}:
        kind = "LoRA" if name in catalog.loras else "model"
        raise Invalid(f"there is a {kind} {name} already; change it in {catalog_file(settings)}")


def entry_text(kind: Kind, name: str, entry: Mapping[str, Any]) -> str:
    """The entry as TOML: a table, and one for each engine; what is empty is left out."""
    rest = {key: value for key, value in entry.items() if key != "engines"}
    lines = [f"[{kind}.{name}]", *_pairs(rest)] if rest else []
    for engine, weights in entry.get("engines", {}).items():
        lines += [f"[{kind}.{name}.engines.{engine}]", *_pairs(weights)]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if value not in (None, "", [], {}):
            yield f"{_key(key)} = {_value(value)}"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    """Texts, numbers, truth values and lists of them: TOML writes them as JSON does."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_pairs(value)) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path}: {unreadable(error)}") from None
