"""Arrow IPC files and streams: `.arrow`, `.feather` and the data of Hugging Face datasets.

A local file is mapped and its record batches are views of it. A batch of rows is copied out of the
map, and the mapped pages are released every `RELEASE_BYTES`, so memory is bounded whatever the size
of the record batches. (Compressed ones are an exception: each is decompressed whole, with all its
columns.) From a URL record batches are fetched one after the other, those of a file without its
other columns, so memory is a record batch. Rows are counted without reading them
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

from ...storage.paths import StoragePath, explained
from ..io_extension import mapped_buffer
from .arrow_columns import (
    TableShard,
    TableWriter,
    decoded,
    pyarrow,
    rows_of,
    validated,
    vectors_of,
)
from .arrow_messages import rows_of_batches

MAGIC = b"ARROW1"
RELEASE_BYTES = 16 << 20


class ArrowWriter(TableWriter):
    """Write an Arrow IPC file; see `FormatWriter`."""

    suffixes = (".arrow", ".feather")

    def _open_table(self, file: Any) -> Any:
        return pyarrow().ipc.new_file(file, self.columns.schema)


class StreamWriter(ArrowWriter):
    """Write an Arrow IPC stream, the form of Hugging Face datasets; see `FormatWriter`."""

    def _open_table(self, file: Any) -> Any:
        return pyarrow().ipc.new_stream(file, self.columns.schema)


@dataclass(frozen=True)
class ArrowShard(TableShard):
    """One column of an Arrow IPC file."""

    format = "arrow"
    writer_class = ArrowWriter

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
                    yield rows_of(values, self)
                    unreleased += batch_rows * self.row_bytes
                    if isinstance(data, mmap.mmap) and unreleased >= RELEASE_BYTES:
                        data.madvise(mmap.MADV_DONTNEED)
                        unreleased = 0
                batch_first = end

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the file."""
        with _opened_data(self.path) as data:
            return _open_reader(data).schema

    def other_columns(self) -> Iterator[Any]:
        """Yield the columns other than the rows, as the record batches of the file."""
        with _opened_data(self.path) as data:
            for batch in _record_batches(data):
                yield validated(batch.drop_columns([self.column]))


@dataclass(frozen=True)
class StreamShard(ArrowShard):
    """One column of an Arrow IPC stream."""

    format = "arrow-stream"
    writer_class = StreamWriter


def read_shard(path: StoragePath, column: str | None = None) -> ArrowShard:
    """Open a column of rows of an Arrow IPC file or stream; see `vectors_of` for its choice."""
    stamp = path.stamp()
    with _opened_data(path) as data:
        reader = _open_reader(data)
        with path.opened() as file:
            num_rows = sum(rows_of_batches(path, file, _is_stream(reader)))

        def arrays(name: str) -> Iterator[Any]:
            return (batch.column(name) for batch in _record_batches(data, name))

        name, dtype, dimension = vectors_of(path, reader.schema, column, arrays)
    shard_class = StreamShard if _is_stream(reader) else ArrowShard
    return shard_class(path, num_rows, dimension, dtype, name, stamp)


@contextmanager
def _opened_data(path: StoragePath) -> Iterator[mmap.mmap | io.BufferedReader]:
    """Map a local file, or open a remote one that fetches what is read."""
    if not path.stamp()[0]:
        raise ValueError(f"{path}: is empty, expected an Arrow file or stream; write it again")
    with explained(path), path.mapped() as data, decoded(path, data):
        buffer = mapped_buffer(data) if isinstance(data, mmap.mmap) else None
        yield data
        if buffer and buffer.lost:
            raise ValueError(f"{path}: changed while it was read; open it again")


def _open_reader(data: mmap.mmap | io.BufferedReader, column: str | None = None) -> Any:
    """Return a reader of record batches.

    A remote file is read without its other columns, if `column` is given. (A reader of one column
    of a mapped file would copy it.)
    """
    pa = pyarrow()
    data.seek(0)
    open_data = pa.ipc.open_file if data.read(len(MAGIC)) == MAGIC else pa.ipc.open_stream
    data.seek(0)
    if isinstance(data, mmap.mmap):
        return open_data(pa.py_buffer(data))
    reader = open_data(data)
    if column is None or _is_stream(reader):
        return reader
    options = pa.ipc.IpcReadOptions(included_fields=[reader.schema.get_field_index(column)])
    data.seek(0)
    return open_data(data, options=options)


def _is_stream(reader: Any) -> bool:
    return isinstance(reader, pyarrow().ipc.RecordBatchStreamReader)


def _record_batches(
    data: mmap.mmap | io.BufferedReader, column: str | None = None
) -> Iterator[Any]:
    reader = _open_reader(data, column)
    if _is_stream(reader):
        return iter(reader)
    return map(reader.get_batch, range(reader.num_record_batches))
