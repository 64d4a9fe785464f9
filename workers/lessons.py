"""What a lack of memory taught a lane on this machine, kept from one worker to the next.

It stands in the session's info: `learnt_cap` (a micro-batch, or null) and `eased` (what each rung
of Engine.ease did). The next worker of the same lane, host, device, memory, weights and mode
begins with it. An explicit --micro-batch forgets it.
"""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row

from farm.catalog import Lane
from farm.errors import DatabaseUnavailable
from farm.store import sessions
from farm.store.db import Database
from workers.child import Child
from workers.engine import EngineConfig, EngineInfo
from workers.messages import Cap, Eased, Lesson, TooLarge

log = logging.getLogger(__name__)


class Lessons:
    """`cap`: the largest micro-batch now."""

    def __init__(self, db: Database, config: EngineConfig) -> None:
        self._db, self._config = db, config
        self.cap = 0
        self._unlearnt_cap: int | None = None
        self._learnt_cap: int | None = None
        self._eased: tuple[str, ...] = ()
        self._too_large: int | None = None
        self._load_s = 0.0

    def load(self, child: Child) -> EngineInfo:
        """Start the child with what earlier workers learnt. Raises as Child.start does."""
        info, last = None, self._last()
        if last and (last.info.get("learnt_cap") or last.info.get("eased")):
            cap, eased = last.info.get("learnt_cap"), tuple(last.info.get("eased") or ())
            child.adopt(micro_batch=self._least(cap), eased=len(eased))
            info = self._timed(child)
            if self._same(last, info):
                self._learnt_cap, self._eased = cap, eased
                log.warning("begins with what an earlier worker learnt: %s", self.note)
            else:
                log.info("what an earlier worker learnt holds no more; loading anew")
                child.adopt(micro_batch=self._config.micro_batch, eased=self._config.eased)
                info = None
        info = info or self._timed(child)
        self.cap = info.micro_batch
        self._unlearnt_cap = None if self._learnt_cap else info.micro_batch
        return info

    def _timed(self, child: Child) -> EngineInfo:
        began = time.monotonic()
        info = child.start()
        self._load_s = time.monotonic() - began
        return info

    def take(self, event: Lesson) -> None:
        """Learn from the child's ladder."""
        match event:
            case Cap(size):
                log.warning("out of memory: micro-batches of at most %d from now on", size)
                self.cap = size
                self._learnt_cap = size if size != self._unlearnt_cap else None
            case Eased(what, _):
                log.warning("out of memory: %s from now on", what)
                self._eased += (what,)
            case TooLarge(pixels, eased):
                log.warning("pictures of %d pixels or more do not fit even alone", pixels)
                self._too_large, self._eased = pixels, self._eased[:eased]

    @property
    def note(self) -> str:
        """For a person; empty when nothing was learnt."""
        parts = [f"micro-batches of {self._learnt_cap}"] if self._learnt_cap else []
        parts += self._eased
        if self._too_large:
            parts.append(f"nothing of {self._too_large} pixels or more")
        return f"short of memory: {', '.join(parts)}" if parts else ""

    def told(self, info: EngineInfo) -> dict[str, Any]:
        """The session's info."""
        learnt = {"learnt_cap": self._learnt_cap, "eased": list(self._eased)}
        mode = {"micro_batch": self.cap, "strict": self._config.strict}
        return {**asdict(info), **mode, **learnt, "load_s": self._load_s}

    def _last(self) -> Row[Any, Any, Any] | None:
        config = self._config
        if config.micro_batch:
            return None
        lane = Lane(config.model, config.engine)
        try:
            with self._db.read() as connection:
                return sessions.last(connection, lane, socket.gethostname(), config.device or "")
        except DatabaseUnavailable as error:
            log.warning("begins without what earlier workers learnt: %s", error.message)
            return None

    def _least(self, cap: int | None) -> int | None:
        """The cap learnt, if the catalogue does not ask for a smaller one."""
        catalogued = self._config.weights.micro_batch
        return min(cap, catalogued) if cap and catalogued else cap

    def _same(self, last: Row[Any, Any, Any], info: EngineInfo) -> bool:
        then = (last.device, last.memory, last.info.get("weights_sha256"), last.info.get("strict"))
        return then == (info.device, info.memory, info.weights_sha256, self._config.strict)
