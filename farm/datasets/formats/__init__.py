"""Shards in the formats that people load: one Writer each, chosen by `open_writer`.

    webdataset/train-00003.tar        a tar of {row:08d}.png, .json and .txt
    parquet/train-00003.parquet       a table whose column `image` the library `datasets` shows
    imagefolder/train-00003/          {row:08d}.png and metadata.jsonl

The same samples make the same bytes, whenever and by whomever they are written; Parquet's need the
same pyarrow too. A shard without samples has no files: readers stumble over an empty tar.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from farm.datasets.formats.record import check_columns
from farm.datasets.formats.writer import Writer, Written
from farm.datasets.sample import Sample
from farm.errors import InvalidParameter

FORMATS = ("webdataset", "parquet", "imagefolder")

__all__ = ["FORMATS", "Writer", "Written", "check_columns", "first", "open_writer", "write"]


def first(formats: Collection[str]) -> str:
    """The one that `datasets.load_dataset` of the whole directory gives."""
    return next(form for form in ("parquet", "webdataset", "imagefolder") if form in formats)


def open_writer(
    form: str, name: str, folder: Path, columns: Mapping[str, type] | None = None
) -> Writer:
    """A writer of the shard `name` (train-00003), whose files appear below `folder`.

    `columns`: the samples' own columns with their types: str, int, float or bool. The writer is a
    context manager: left without `close`, it removes what it wrote. Raises InvalidParameter for an
    unknown format.
    """
    if form == "webdataset":
        from farm.datasets.formats.webdataset import WebDatasetWriter as Made
    elif form == "parquet":
        from farm.datasets.formats.parquet import ParquetWriter as Made  # type: ignore[assignment]
    elif form == "imagefolder":
        from farm.datasets.formats.imagefolder import (  # type: ignore[assignment]
            ImageFolderWriter as Made,
        )
    else:
        raise InvalidParameter(f"no format {form[:40]!r}, there are: {', '.join(FORMATS)}")
    return Made(name, folder, columns or {})


def write(
    form: str,
    samples: Iterable[Sample],
    name: str,
    folder: Path,
    columns: Mapping[str, type] | None = None,
) -> list[Written]:
    """One whole shard; see `open_writer`."""
    with open_writer(form, name, folder, columns) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.close()
