"""Log lines of the services: one event a line, with the batch, job, claim and worker it is about.

As text for a person (`key=value` at the end of the line) or as JSON for a collector, on standard
error; who starts the process keeps and rotates them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, Protocol


class Ref(Protocol):
    """Which job: a farm.store.ids.JobRef."""

    @property
    def batch_id(self) -> str: ...


class Held(Protocol):
    """A claim on a job: a farm.store.jobs.Claim."""

    @property
    def ref(self) -> Ref: ...
    @property
    def claim_no(self) -> int: ...


_CONTROL = re.compile(  # and what turns the direction of a text around
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)
_always: dict[str, Any] = {}


def begin(level: str, form: str, **always: object) -> None:
    """Log from `level` on, as `text` or `json`; `always`: fields of every line of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("alembic").setLevel("WARNING")
    _always.clear()
    _always.update(always)


def always(**fields: object) -> None:
    """Add fields to every line from now on, such as the session of a worker."""
    _always.update(fields)


def about(claim: Held) -> dict[str, Any]:
    """The `extra` of a line about a claimed job."""
    place = claim.ref.batch_id
    return {"about": {"batch": place, "job": str(claim.ref), "claim": claim.claim_no}}


def escaped(text: str) -> str:
    """`text` on one line: what a prompt or a file holds must not end a line or move a cursor."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {**_always, **getattr(record, "about", {})}


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class TextLines(logging.Formatter):
    """`TIME LEVEL LOGGER MESSAGE key=value ...`; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        told = [_time(record), record.levelname, record.name, escaped(record.getMessage())]
        for key, value in _fields(record).items():
            text = str(value)
            told.append(f"{key}={text if _PLAIN.fullmatch(text) else json.dumps(text)}")
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            told[-1] += "".join(f"\n  {escaped(line)}" for line in lines)
        return " ".join(told)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, exception, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)
