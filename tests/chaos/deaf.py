"""A worker whose Celery consumer falls silent: connected, and no token is taken from the queue.

    python -m tests.chaos.deaf consumer|process --model M --engine E

`consumer`: until it is restarted; `process`: until the process is a new one. What is patched is
patched in this process only.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from kombu.transport.redis import Channel

from workers import app, watchdog

NEW = "FARM_TEST_NEW_PROCESS"


def go_deaf(until: str) -> None:
    listen, mend = Channel._brpop_start, watchdog.Watchdog._mend
    deaf = True

    def brpop_start(self: Any, timeout: float | None = None) -> None:
        if not deaf:
            listen(self) if timeout is None else listen(self, timeout)

    def mend_it(self: watchdog.Watchdog, tokens: int) -> None:
        nonlocal deaf
        deaf = until != "consumer"
        mend(self, tokens)

    Channel._brpop_start, watchdog.Watchdog._mend = brpop_start, mend_it  # type: ignore[method-assign]


if __name__ == "__main__":
    watchdog.LOOK_S, watchdog.DEAF_S = 0.5, 1.5
    if not os.environ.get(NEW):
        os.environ[NEW] = "1"  # for the next life of this process
        go_deaf(sys.argv[1])
    sys.exit(app.main(sys.argv[2:]))
