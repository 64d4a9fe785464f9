"""Parquet (https://parquet.apache.org/docs/file-format/) with pictures in a column of their own.

The key `huggingface` of the schema's metadata tells the library `datasets` that `image` is an
Image feature; to all others it is a struct of bytes and a name. Texts are compressed, pictures are
compressed already.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from farm.datasets.formats.record import types
from farm.datasets.formats.writer import HashedFile, Writer, Written
from farm.datasets.sample import Sample, Value
from farm.pictures import EXTENSIONS

GROUP_BYTES = 16 << 20  # of pictures in a row group, which writers and readers hold whole
GROUP_ROWS = 10_000
_PAGE_ROWS = (
    4  # written before Arrow looks how large its page is; pages of many pictures cost twice
)
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_PICTURE = ("image.bytes", "image.path")  # as Parquet names the leaves


def schema(columns: Mapping[str, type]) -> Any:
    """The pyarrow.Schema of every shard: row, image, then the record."""
    row, *rest = ((name, _ARROW[kind]) for name, kind in types(columns).items())
    fields = [row, ("image", _IMAGE), *rest]
    told = {name: {"dtype": _dtype(kind), "_type": "Value"} for name, kind in rest}
    features = {"row": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}, **told}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


def _dtype(kind: Any) -> str:
    return {"double": "float64"}.get(str(kind), str(kind))


class ParquetWriter(Writer):
    place = "parquet/{}.parquet"
    _file: HashedFile | None = None

    def _begin(self) -> None:
        self._schema = schema(self.columns)
        self._file = HashedFile(self.path)
        names = [name for name in self._schema.names if name != "image"]
        self._table = pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            self._schema,
            compression={**dict.fromkeys(names, "zstd"), **dict.fromkeys(_PICTURE, "none")},
            use_dictionary=[name for name in names if name not in ("row", "seed", "sha256")],
            write_statistics=names,
            write_batch_size=_PAGE_ROWS,
        )
        self._rows: list[dict[str, Value]] = []
        self._pictures: list[bytes] = []
        self._names: list[str] = []
        self._bytes = 0

    def _add(self, sample: Sample, told: dict[str, Value]) -> None:
        self._rows.append(told)
        self._pictures.append(sample.data)
        self._names.append(f"{sample.row:08d}.{EXTENSIONS[sample.form]}")
        self._bytes += len(sample.data)
        if self._bytes >= GROUP_BYTES or len(self._rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        pictures = [_binary(self._pictures), pa.array(self._names, pa.string())]
        image = pa.StructArray.from_arrays(pictures, fields=list(_IMAGE))
        columns = [
            image if field.name == "image" else _column(self._rows, field) for field in self._schema
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        self._table.write_batch(batch, row_group_size=len(self._rows))
        self._rows, self._pictures, self._names, self._bytes = [], [], [], 0

    def _end(self) -> list[Written]:
        assert self._file
        if self._rows:
            self._flush()
        self._table.close()
        return [self._file.written(self.key)]

    def _abandon(self) -> None:
        if self._file:
            self._file.abandon()


def _column(rows: list[dict[str, Value]], field: Any) -> Any:
    return pa.array([told[field.name] for told in rows], field.type)


def _binary(datas: list[bytes]) -> Any:
    """A binary array in one copy; pa.array takes several, as its buffer grows."""
    ends = array("i", accumulate(map(len, datas), initial=0))
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(datas))]
    return pa.Array.from_buffers(pa.binary(), len(datas), buffers)
