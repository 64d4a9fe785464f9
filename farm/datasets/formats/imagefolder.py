"""The Hub's image folder: pictures, and a metadata.jsonl beside them whose `file_name` names them.

https://huggingface.co/docs/datasets/image_dataset#imagefolder
"""

from __future__ import annotations

from farm.datasets.formats.record import line
from farm.datasets.formats.writer import HashedFile, Writer, Written, start_disk
from farm.datasets.sample import Sample, Value
from farm.pictures import EXTENSIONS

METADATA = "metadata.jsonl"


class ImageFolderWriter(Writer):
    place = "imagefolder/{}"
    _metadata: HashedFile | None = None

    def _begin(self) -> None:
        self._metadata = HashedFile(self.path / METADATA)
        self._pictures: list[Written] = []

    def _add(self, sample: Sample, told: dict[str, Value]) -> None:
        assert self._metadata
        name = f"{sample.row:08d}.{EXTENSIONS[sample.form]}"
        path = self.path / name
        with path.open("wb") as file:
            file.write(sample.data)
            file.flush()
            start_disk(file, 0)
        self._pictures.append(Written(f"{self.key}/{name}", path, len(sample.data), sample.sha256))
        self._metadata.write(line({"file_name": name, **told}))

    def _end(self) -> list[Written]:
        assert self._metadata
        return [*self._pictures, self._metadata.written(f"{self.key}/{METADATA}")]

    def _abandon(self) -> None:
        if self._metadata:
            self._metadata.abandon()
