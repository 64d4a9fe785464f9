"""Notices a loop that hangs while other threads go on."""

from __future__ import annotations

import time

MOST_LOOK_S = 10.0  # a process that was stopped meanwhile has not hung for so long


class Stall:
    """`look` is called from time to time by another thread than `sign` and `pause`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._watched = False
        self._quiet_s, self._looked_at = 0.0, time.monotonic()

    def sign(self) -> None:
        """The loop goes on, and the next sign must come within `limit_s`."""
        self._quiet_s, self._watched = 0.0, True

    def pause(self) -> None:
        """The loop waits for something that may take any time."""
        self._watched = False

    def look(self) -> bool:
        """Whether the loop hangs."""
        now = time.monotonic()
        self._quiet_s += min(now - self._looked_at, MOST_LOOK_S)
        self._looked_at = now
        return self._watched and self._quiet_s > self._limit_s
