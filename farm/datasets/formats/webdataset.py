"""WebDataset: a tar whose neighbouring members of one stem are one sample.

https://github.com/webdataset/webdataset; the tar is plain ustar, as POSIX.1-1988 has it, without
times, owners and names of users.
"""

from __future__ import annotations

import tarfile

from farm.datasets.formats.record import line
from farm.datasets.formats.writer import HashedFile, Writer, Written
from farm.datasets.sample import Sample, Value
from farm.pictures import EXTENSIONS

_RECORD = tarfile.RECORDSIZE
_BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # no time, no owner, mode 0644
_MODE, _TIME, _REST = _BLANK[100:124], _BLANK[136:148], _BLANK[156:]
_SUM = sum(_MODE + _TIME + b" " * 8 + _REST)


def _head(name: str, size: int) -> bytes:
    """A member's, as tarfile writes it in ten times the time."""
    named, sized = name.encode().ljust(100, b"\0"), b"%011o\0" % size
    checksum = b"%06o\0 " % (_SUM + sum(named) + sum(sized))
    return b"".join((named, _MODE, sized, _TIME, checksum, _REST))


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    return _head(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)


class WebDatasetWriter(Writer):
    place = "webdataset/{}.tar"
    _file: HashedFile | None = None

    def _begin(self) -> None:
        self._file = HashedFile(self.path)

    def _add(self, sample: Sample, told: dict[str, Value]) -> None:
        assert self._file
        stem, data = f"{sample.row:08d}", sample.data
        self._file.write(_head(f"{stem}.{EXTENSIONS[sample.form]}", len(data)))
        self._file.write(data)
        rest = [bytes(-len(data) % tarfile.BLOCKSIZE)]
        rest += _member(f"{stem}.json", line(told))
        rest += _member(f"{stem}.txt", str(told["prompt"]).encode())
        self._file.write(b"".join(rest))

    def _end(self) -> list[Written]:
        assert self._file
        size = self._file.size + 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -size % _RECORD))
        return [self._file.written(self.key)]

    def _abandon(self) -> None:
        if self._file:
            self._file.abandon()
