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


class WebDatasetWriter(Writer):
    place = "webdataset/{}.tar"
    _file: HashedFile | None = None

    def _begin(self) -> None:
        self._file = HashedFile(self.path)

    def _add(self, sample: Sample, told: dict[str, Value]) -> None:
        stem = f"{sample.row:08d}"
        self._member(f"{stem}.{EXTENSIONS[sample.form]}", sample.data)
        self._member(f"{stem}.json", line(told))
        self._member(f"{stem}.txt", str(told["prompt"]).encode())

    def _member(self, name: str, data: bytes) -> None:
        assert self._file
        head = tarfile.TarInfo(name)  # no time, no owner, mode 0644
        head.size = len(data)
        self._file.write(head.tobuf(tarfile.USTAR_FORMAT))
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def _end(self) -> list[Written]:
        assert self._file
        size = self._file.size + 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -size % _RECORD))
        return [self._file.written(self.key, "application/x-tar")]

    def _abandon(self) -> None:
        if self._file:
            self._file.abandon()
