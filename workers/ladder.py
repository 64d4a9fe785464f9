"""What the engine's process does when the memory does not suffice, one rung after the other.

1. Half the micro-batch, again and again, down to one picture.
2. `Engine.ease`, as often as the engine knows something: tiles, then offload.
3. The job fails; from then on pictures of as many pixels or more are refused unrendered, unless
   one of that size did fit before: then others hold the memory, and it may come back.

No rung is taken twice, so the ladder ends. What did not help in the end is not kept: the cap is
as it was, and the parent replaces a process that was eased in vain.
"""

from __future__ import annotations

from collections.abc import Callable

from farm.errors import ModelNotLoaded, OutOfMemory
from farm.spec import JobSpec
from farm.units import show_size
from workers.engine import Engine, EngineConfig
from workers.messages import Cap, Eased, Message, TooLarge

MOST_RUNGS = 16
"""Of an engine's own; one that always knows another would be asked for ever."""


class Ladder:
    """The rungs of one engine process. `cap`: the largest micro-batch now."""

    def __init__(
        self, engine: Engine, config: EngineConfig, cap: int, send: Callable[[Message], None]
    ) -> None:
        self._engine, self._send = engine, send
        self.cap = self._useful_cap = cap
        self._rungs = self._useful_rungs = config.eased
        self._taken: list[str] = []
        self._too_large = config.too_large
        self._fits = 0  # pixels of the largest picture rendered

    def rendered(self, spec: JobSpec) -> None:
        """A micro-batch of such jobs came out: what was given up for it was not in vain."""
        self._fits = max(self._fits, _pixels(spec))
        self._useful_cap, self._useful_rungs = self.cap, self._rungs

    def refusal(self, spec: JobSpec) -> OutOfMemory | None:
        """Why such a job need not be tried, if it need not."""
        if self._too_large is None or _pixels(spec) < self._too_large:
            return None
        return OutOfMemory(
            f"{spec.width}x{spec.height} is too large for this worker's memory: a picture of "
            f"{self._too_large} pixels did not fit alone"
        )

    def descend(self, spec: JobSpec, size: int) -> bool:
        """Make do with less after `size` such jobs at once were too many; False: nothing is left.

        Raises what Engine.ease raises.
        """
        if size > 1:
            self._set_cap(size // 2)
            return True
        what = self._engine.ease() if self._rungs < MOST_RUNGS else None
        if what is not None:
            self._rungs += 1
            self._taken.append(what)
            self._send(Eased(what, self._rungs))
            return True
        if _pixels(spec) > self._fits:
            self._too_large = _pixels(spec)
            if self.cap != self._useful_cap:
                self._set_cap(self._useful_cap)
            self._send(TooLarge(self._too_large, self._useful_rungs))
        return False

    def last_word(self, spec: JobSpec, error: OutOfMemory) -> OutOfMemory:
        """The error of a job that did not fit alone, with all that was tried."""
        tried = f" (tried: {'; '.join(self._taken)})" if self._taken else ""
        size = f"{spec.width}x{spec.height}"
        return OutOfMemory(f"{size} does not fit even alone{tried}: {error.message}")

    def _set_cap(self, cap: int) -> None:
        self.cap = cap
        self._send(Cap(cap))


def check_need(config: EngineConfig, memory: int | None) -> None:
    """Raises ModelNotLoaded where the model needs more than `memory` bytes (None: unknown)."""
    need = config.needs_memory
    if need is not None and memory is not None and memory < need:
        raise ModelNotLoaded(
            f"model {config.model} needs {show_size(need)} of memory (memory_gb in models.toml), "
            f"this worker may use {show_size(memory)}: start it on a larger device or with a "
            "higher --memory-limit, or correct memory_gb"
        )


def _pixels(spec: JobSpec) -> int:
    return spec.width * spec.height
