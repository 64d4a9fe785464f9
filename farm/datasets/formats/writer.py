"""What the writers of all formats share."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ClassVar, Self

from farm.datasets.formats.record import record
from farm.datasets.sample import Sample, Value

_BUFFER = 1 << 20  # bytes
_STARTED = 16 << 20  # bytes of a file that are written before the disk is set to work on them


@dataclass(frozen=True)
class Written:
    """A finished file: its path within the dataset, where it lies now, its size in bytes."""

    key: str
    path: Path
    size: int
    sha256: str


def start_disk(file: BinaryIO, first: int) -> None:
    """Let the disk begin with what was written from a place on: a later fsync has less to wait for.

    Linux does so when it is told that the pages are no longer needed; they stay until then.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), first, 0, os.POSIX_FADV_DONTNEED)


class HashedFile:
    """A new file that is hashed as it is written; a file object for whoever only writes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.size, self.closed, self._abandoned = 0, False, False
        self._path, self._hash = path, hashlib.sha256()
        self._file = path.open("wb", buffering=_BUFFER)
        self._started = 0

    def write(self, data: bytes) -> int:
        if self._abandoned:
            return len(data)
        self._hash.update(data)
        self.size += len(data)
        written = self._file.write(data)
        if self.size - self._started >= _STARTED:
            start_disk(self._file, self._started)
            self._started = self.size
        return written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def abandon(self) -> None:
        """Close it; what is written later, as Arrow does at its end, goes nowhere."""
        self._abandoned = True
        self.close()

    def written(self, key: str) -> Written:
        """Closes it."""
        self.close()
        return Written(key, self._path, self.size, self._hash.hexdigest())


class Writer(ABC):
    """One shard in one format. It holds no more than a few pictures, whatever the shard's size."""

    place: ClassVar[str]  # the file or directory within the dataset, with {} for the shard's name

    def __init__(self, name: str, folder: Path, columns: Mapping[str, type]) -> None:
        self.key = self.place.format(name)
        self.path = folder / self.key
        self.columns = dict(columns)
        self._last, self._done = -1, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._done:
            self._abandon()
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.unlink(missing_ok=True)

    def add(self, sample: Sample) -> None:
        """Raises ValueError unless rows come in ascending order."""
        if sample.row <= self._last:
            raise ValueError(f"row {sample.row} after row {self._last}")
        if self._last < 0:
            self._begin()
        self._last = sample.row
        self._add(sample, record(sample, self.columns))

    def close(self) -> list[Written]:
        """The shard's files, finished, by key; none where nothing was added."""
        found = self._end() if self._last >= 0 else []
        self._done = True
        return found

    @abstractmethod
    def _begin(self) -> None:
        """Open what the first sample needs."""

    @abstractmethod
    def _add(self, sample: Sample, told: dict[str, Value]) -> None: ...

    @abstractmethod
    def _end(self) -> list[Written]: ...

    @abstractmethod
    def _abandon(self) -> None:
        """Close what is open; perhaps nothing was begun."""
