"""A file while it is being fetched, and what all the files of one fetch share."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_BURST_S = 0.1  # of a rate limit: what may be caught up after a pause


class Flow:
    """What the transfers of a fetch share: the rate limit (bytes a second), the count, the end."""

    def __init__(self, rate: float | None = None) -> None:
        self.rate, self.received = rate, 0
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._free = 0.0

    def take(self, n: int) -> None:
        """Count n bytes; wait until the limit allows them."""
        with self._lock:
            self.received += n
            if self.rate is None:
                return
            now = time.monotonic()
            self._free = max(self._free, now - (_BURST_S if self._free else 0)) + n / self.rate
            wait = self._free - now
        if wait > 0:
            self.stop.wait(wait)


class Part:
    """A file that is being written, with the SHA-256 of what it holds so far."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self.path, self._advance = path, advance
        self._tag = path.with_suffix(".etag")
        self._file = path.open("ab")
        self.sha256, self.length = hashlib.sha256(), 0
        with path.open("rb") as held:
            while data := held.read(2**20):
                self.sha256.update(data)
                self.length += len(data)

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def etag(self) -> str:
        """The entity tag of what the part holds, if the server gave a strong one."""
        try:
            return self._tag.read_text("ascii")
        except (OSError, ValueError):
            return ""

    def keep_etag(self, etag: str) -> None:
        strong = re.fullmatch(r'"[!#-~]{1,200}"', etag)
        self._tag.write_text(etag if strong else "", "ascii")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.length += len(data)
        self._advance(len(data))

    def finish(self) -> str:
        """All is on the disk; its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.sha256.hexdigest()

    def restart(self) -> None:
        """Throw away what it holds."""
        self._file.truncate(0)
        self._advance(-self.length)
        self.sha256, self.length = hashlib.sha256(), 0
