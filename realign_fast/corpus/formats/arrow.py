"""Arrow IPC files and streams: `.arrow`, `.feather` and the data of Hugging Face datasets.

A local file is mapped and its record batches are views of it. A batch of rows is copied out of the
map, and the mapped pages are released every `RELEASE_BYTES`, so memory is bounded whatever the size
of the record batches. (Compressed ones are an exception: each is decompressed whole, with all its
columns.) From a URL record batches are fetched one after the other, those of a file without its
other columns, so memory is a record batch. Their rows are counted without fetching them
(`arrow_messages.py`).
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
from .arrow_columns import decoded, first_dimension, pyarrow, rows_of, vectors_of
from .arrow_messages import rows_of_batches
from .tables import TableShard, TableWriter, validated

MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
RELEASE_BYTES = 16 << 20


@dataclass(frozen=True)
class ArrowShard(TableShard):
    """One column of an Arrow IPC file or stream."""

    is_stream: bool

    @property
    def format(self) -> str:
        """Either "arrow" or "arrow-stream"."""
        return "arrow-stream" if self.is_stream else "arrow"

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield views of the mapped record batches; see `StreamedShard.pieces`."""
        batch_first, unreleased = 0, 0  # row, bytes
        with _opened_data(self.path) as data:
            for batch in _record_batches(data, self.column):
                array, end = batch.column(self.column), batch_first + len(batch)
                for row in range(max(first, batch_first), end, batch_rows):
                    if isinstance(data, mmap.mmap) and self.path.stamp()[0] != len(data):
                        raise self.changed_error()  # touching a page that is gone would be a SIGBUS
                    values = array[row - batch_first : row - batch_first + batch_rows]
                    yield rows_of(values, self.vectors, self.path, row)
                    unreleased += batch_rows * self.row_bytes
                    if isinstance(data, mmap.mmap) and unreleased >= RELEASE_BYTES:
                        data.madvise(mmap.MADV_DONTNEED)
                        unreleased = 0
                batch_first = end

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the file."""
        with _opened_data(self.path) as data:
            return _open_reader(data)[0].schema

    def other_columns(self) -> Iterator[Any]:
        """Yield the columns other than the rows, as the record batches of the file."""
        with _opened_data(self.path) as data:
            for batch in _record_batches(data):
                yield validated(batch.drop_columns([self.column]))

    def writer(self, path: AnyPath) -> ArrowWriter:
        """Return a writer of the same kind of file, with the other columns of this one."""
        writer = StreamWriter if self.is_stream else ArrowWriter
        return writer(path, self.num_rows, self.dimension, self.torch_dtype, self.table_columns)


class ArrowWriter(TableWriter):
    """Write an Arrow IPC file; see `FormatWriter`."""

    suffixes = (".arrow", ".feather")

    def _open_table(self, file: Any) -> Any:
        return pyarrow().ipc.new_file(file, self.columns.schema)


class StreamWriter(ArrowWriter):
    """Write an Arrow IPC stream, the form of Hugging Face datasets; see `FormatWriter`."""

    def _open_table(self, file: Any) -> Any:
        return pyarrow().ipc.new_stream(file, self.columns.schema)


def read_shard(path: StoragePath, column: str | None = None) -> ArrowShard:
    """Open a column of rows of an Arrow IPC file or stream; see `vectors_of` for its choice."""
    stamp = path.stamp()
    with _opened_data(path) as data:
        reader, is_stream = _open_reader(data)
        vectors = vectors_of(path, reader.schema, column)
        if is_stream and _last_bytes(data) != END_OF_STREAM:
            raise ValueError(f"{path}: truncated: has no end-of-stream mark; write it again")
        if path.is_remote:
            with path.opened() as file:
                num_rows = sum(rows_of_batches(path, file, is_stream))
        else:
            num_rows = sum(len(batch) for batch in _record_batches(data))
        dimension = vectors.dimension
        if not dimension:
            arrays = (batch.column(vectors.name) for batch in _record_batches(data, vectors.name))
            dimension = first_dimension(path, vectors.name, arrays)
    return ArrowShard(path, num_rows, dimension, vectors.dtype, vectors.name, stamp, is_stream)


@contextmanager
def _opened_data(path: StoragePath) -> Iterator[mmap.mmap | io.BufferedReader]:
    """Map a local file, or open a remote one that fetches what is read."""
    if not path.stamp()[0]:
        raise ValueError(f"{path}: is empty, expected an Arrow file or stream; write it again")
    with explained(path), path.mapped() as data, decoded(path, data):
        yield data


def _open_reader(
    data: mmap.mmap | io.BufferedReader, column: str | None = None
) -> tuple[Any, bool]:
    """Return a reader, and whether the data are a stream.

    A remote file is read without its other columns, if `column` is given. (A reader of one column
    of a mapped file would copy it.)
    """
    pa = pyarrow()
    if isinstance(data, mmap.mmap):
        is_stream = data[:6] != MAGIC
        open_data = pa.ipc.open_stream if is_stream else pa.ipc.open_file
        return open_data(pa.py_buffer(data)), is_stream
    data.seek(0)
    is_stream, options = data.read(6) != MAGIC, None
    data.seek(0)
    if column and not is_stream:
        index = pa.ipc.open_file(data).schema.get_field_index(column)
        options = pa.ipc.IpcReadOptions(included_fields=[index])
        data.seek(0)
    open_data = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    return open_data(data, options=options), is_stream


def _last_bytes(data: mmap.mmap | io.BufferedReader) -> bytes:
    size = len(END_OF_STREAM)
    if isinstance(data, mmap.mmap):
        return data[-size:]
    data.seek(-size, io.SEEK_END)
    return data.read(size)


def _record_batches(
    data: mmap.mmap | io.BufferedReader, column: str | None = None
) -> Iterator[Any]:
    reader, is_stream = _open_reader(data, column)
    if is_stream:
        yield from reader
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))
