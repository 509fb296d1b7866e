"""Rows read directly from the pages of a parquet file, where they lie there as numbers.

A column chunk (one column of a row group) is a run of pages. Written uncompressed and without a
dictionary (`PLAIN`), a page consists of its levels, which say where lists begin and what is null,
and then of the numbers as they are in memory. `csrc/io/parquet/parquet_pages.cpp` looks through the
levels and copies the numbers into a batch, many times faster than pyarrow builds its lists. The
place of a chunk and how it was written are in the footer, which `csrc/io/parquet/footer.cpp` reads:
pyarrow ends the process when it is asked for a codec that it does not know. pyarrow decodes all
else (`parquet.py`). For the format see parquet.apache.org, "File Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from ..io_extension import io as _io
from ..streamed_shard import Buffers, StreamedShard

NUMBERS = {"FLOAT": "float32", "DOUBLE": "float64", "FIXED_LEN_BYTE_ARRAY": "float16"}
ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # the latter two are those of the levels
ADVICE = "write it with compression 'none' and use_dictionary=False to have it read directly"


class NotDirect(ValueError):
    """The reason why pyarrow has to decode a row group, found in the footer of its file."""


# The compiled reader raises its own error for what it finds in a page.
NOT_PLAIN = (NotDirect, _io.NotPlain) if _io else (NotDirect,)


def read_pages(
    pages: Any, buffers: Buffers, row: int, first: int, end: int
) -> Iterator[np.ndarray]:
    """Yield the rows `first..end` of a row group that begins at `row`, in batches.

    Batches end at multiples of their size. It stops early at a page that has to be decoded.
    """
    while first < end:
        rows = buffers.empty(min(buffers.batch_rows - first % buffers.batch_rows, end - first))
        try:
            pages.read(first - row, rows)
        except _io.NotPlain:
            return
        first += len(rows)
        yield rows
        del rows  # or its memory would be kept from the next batch


class ColumnPages:
    """The pages of the rows of an open file, by row group.

    `file` is a `pyarrow.parquet.ParquetFile`, and `descriptor` that of the same file; None if it is
    remote.
    """

    def __init__(self, file: Any, descriptor: int | None, shard: StreamedShard) -> None:
        self._file, self._descriptor, self._shard = file, descriptor, shard

    def of(self, group: int) -> Any:
        """Return the pages of a row group, as `_io.ParquetPages`.

        `NotDirect` is raised if the rows do not lie there as numbers.
        """
        if not hasattr(_io, "read_chunks"):
            raise NotDirect("the compiled reader is not installed; run `realign-fast info`")
        if self._descriptor is None:
            raise NotDirect("its bytes are not in a file of this machine")
        leaf, chunks = self._chunks
        chunk = chunks[group]
        if chunk.codec != "UNCOMPRESSED" or chunk.is_elsewhere:
            raise NotDirect(f"its column is compressed with {chunk.codec}; {ADVICE}")
        if chunk.has_dictionary or not set(chunk.encodings) <= ENCODINGS:
            raise NotDirect(f"its column is encoded {', '.join(chunk.encodings)}; {ADVICE}")
        row_values, value_bytes = _sizes(leaf, self._shard)
        rows, start, end = chunk.group_rows, chunk.data_offset, chunk.data_offset + chunk.bytes
        if not 0 <= start <= end <= os.fstat(self._descriptor).st_size:
            raise NotDirect("its column is not inside the file")
        if chunk.values != rows * row_values:
            raise NotDirect(f"it has {chunk.values} values for {rows} rows of {row_values}")
        sizes = {"rows": rows, "row_values": row_values, "value_bytes": value_bytes}
        levels = {
            "max_definition": leaf.max_definition_level,
            "max_repetition": leaf.max_repetition_level,
        }
        try:
            return _io.ParquetPages(self._descriptor, start, end, **sizes, **levels)
        except ValueError as error:
            raise NotDirect(str(error)) from error

    @cached_property
    def _chunks(self) -> tuple[Any, list[Any]]:
        """The leaf of the column in the schema, and its chunk in each row group."""
        schema, name = self._file.schema, self._shard.column
        paths = [schema.column(i).path for i in range(len(schema))]
        leaves = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
        if len(leaves) != 1:
            raise NotDirect(f"{len(leaves)} columns could be {name!r}")
        try:
            chunks = _io.read_chunks(self._descriptor, leaves[0])
        except _io.NotPlain as error:
            raise NotDirect(str(error)) from error
        if len(chunks) != self._file.num_row_groups:
            raise NotDirect("its footer has changed")
        return schema.column(leaves[0]), chunks


def _sizes(leaf: Any, shard: StreamedShard) -> tuple[int, int]:
    """Return the number of values in a row, and the size of each in bytes."""
    physical_type, size = leaf.physical_type, shard.dtype.itemsize
    row_bytes = shard.dimension * size
    fixed = physical_type == "FIXED_LEN_BYTE_ARRAY"
    if leaf.max_repetition_level == 0 and fixed and leaf.length == row_bytes:
        return 1, row_bytes
    if leaf.max_repetition_level == 1 and NUMBERS.get(physical_type) == shard.dtype.name:
        if not fixed or leaf.length == size:
            return shard.dimension, size
    expected = f"rows of {shard.dimension} {shard.dtype}"
    raise NotDirect(f"its column is {physical_type}, not {expected}")
