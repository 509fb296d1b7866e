"""A shard in an Arrow IPC file or stream: `.arrow`, `.feather`, a Hugging Face dataset's data.

The file is mapped and its record batches are views of it; a batch is copied out of the map, and the
map is let go of every `RELEASE_BYTES`, so memory is bounded whatever the size of record batches.
(Compressed ones are an exception: each is decompressed whole, with all its columns.) From a URL
record batches are fetched one after the other, of a file without its other columns: memory is a
record batch. Their rows are counted without fetching them (`arrow_walk.py`).
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, StoragePath, explained
from ..streamed_shard import StreamedShard, torch_dtype
from .arrow_columns import (
    TableWriter,
    Vectors,
    checked,
    decoded,
    first_dimension,
    pyarrow,
    rows_of,
    vectors_of,
)
from .arrow_messages import rows_of_batches
from .npy import changed

MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
RELEASE_BYTES = 16 << 20


@dataclass(frozen=True)
class ArrowShard(StreamedShard):
    stream: bool
    format = property(lambda self: "arrow-stream" if self.stream else "arrow")

    def pieces(self, first: int, size: int) -> Iterator[np.ndarray]:
        vectors = Vectors(self.column, self.dtype, self.dimension)
        begin, used = 0, 0
        with _data(self.path) as data:
            mapped = isinstance(data, mmap.mmap)
            for batch in _batches(data, self.column):
                array, end = batch.column(self.column), begin + len(batch)
                for row in range(max(first, begin), end, size):
                    if mapped and self.path.stamp()[0] != len(data):
                        raise changed(self)  # touching a page that is gone would be a SIGBUS
                    yield rows_of(array[row - begin : row - begin + size], vectors, self.path, row)
                    used += size * self.row_bytes
                    if mapped and used >= RELEASE_BYTES:
                        data.madvise(mmap.MADV_DONTNEED)
                        used = 0
                begin = end

    @property
    def others(self):
        return self._other_columns if len(self.schema) > 1 else None

    @property
    def schema(self) -> Any:
        with _data(self.path) as data:
            return _reader(data)[0].schema

    def _other_columns(self) -> Iterator[Any]:
        with _data(self.path) as data:
            for batch in _batches(data):
                yield checked(batch.drop_columns([self.column]))

    def writer(self, path: AnyPath) -> ArrowWriter:
        dtype = torch_dtype(self)
        kind = StreamWriter if self.stream else ArrowWriter
        shape = (self.num_rows, self.dimension, dtype)
        return kind(path, *shape, self.schema, self.column, self.others)


class ArrowWriter(TableWriter):
    """`ShardWriter` for an Arrow IPC file."""

    suffix = (".arrow", ".feather")

    def _sink(self, file: Any) -> Any:
        return pyarrow().ipc.new_file(file, self.schema)


class StreamWriter(ArrowWriter):
    """`ShardWriter` for an Arrow IPC stream, the form of Hugging Face datasets."""

    def _sink(self, file: Any) -> Any:
        return pyarrow().ipc.new_stream(file, self.schema)


def read_shard(path: StoragePath, column: str | None = None) -> ArrowShard:
    stamp = path.stamp()
    with _data(path) as data:
        reader, stream = _reader(data)
        vectors = vectors_of(path, reader.schema, column)
        if stream and _end(data) != END_OF_STREAM:
            raise ValueError(f"{path}: truncated: has no end-of-stream mark; write it again")
        if isinstance(data, mmap.mmap):
            rows = sum(map(len, _batches(data)))
        else:
            with path.opened() as file:
                rows = sum(rows_of_batches(path, file, stream))
        dimension = vectors.dimension
        if dimension is None:
            arrays = (batch.column(vectors.name) for batch in _batches(data, vectors.name))
            dimension = first_dimension(path, vectors.name, arrays)
    return ArrowShard(path, rows, dimension, vectors.dtype, vectors.name, stamp, stream)


@contextmanager
def _data(path: StoragePath) -> Iterator[mmap.mmap | io.BufferedReader]:
    """The bytes of a file, mapped; not closed at the end: arrays may view it, the last one unmaps
    it. Of a URL a file that fetches them."""
    size = path.stamp()[0]
    if not size:
        raise ValueError(f"{path}: is empty, expected an Arrow file or stream; write it again")
    with explained(path), path.mapped() as data, decoded(path, data):
        yield data


def _reader(data: mmap.mmap | io.BufferedReader, column: str | None = None) -> tuple[Any, bool]:
    """A reader, and whether the file is a stream.

    A reader of one column would copy batches that are mapped; it spares fetching the others.
    """
    pa = pyarrow()
    if isinstance(data, mmap.mmap):
        stream = data[:6] != MAGIC
        return (pa.ipc.open_stream if stream else pa.ipc.open_file)(pa.py_buffer(data)), stream
    data.seek(0)
    stream, options = data.read(6) != MAGIC, None
    data.seek(0)
    if column and not stream:
        place = pa.ipc.open_file(data).schema.get_field_index(column)
        options = pa.ipc.IpcReadOptions(included_fields=[place])
        data.seek(0)
    return (pa.ipc.open_stream if stream else pa.ipc.open_file)(data, options=options), stream


def _end(data: mmap.mmap | io.BufferedReader) -> bytes:
    if isinstance(data, mmap.mmap):
        return data[-8:]
    data.seek(-8, io.SEEK_END)
    return data.read(8)


def _batches(data: mmap.mmap | io.BufferedReader, column: str | None = None) -> Iterator[Any]:
    reader, stream = _reader(data, column)
    if stream:
        yield from reader
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))
