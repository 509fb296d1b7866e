"""Parquet files: one column of rows; the other columns are carried through.

A column chunk (one column of a row group) is a run of pages. Written uncompressed and without a
dictionary (`PLAIN`), a page consists of its levels, which say where lists begin and what is null,
and then of the numbers as they are in memory. `csrc/io/parquet` looks through the levels and copies
the numbers into a batch. It reads the footer too: pyarrow ends the process when it is asked for a
codec that it does not know. For the format see parquet.apache.org, "File Format".

pyarrow decodes all else, in pieces of a batch, through a buffer of `BUFFER_BYTES`: memory is
bounded by the batch and the file's pages, never by a row group. A result has a row group a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ...storage.paths import StoragePath, explained
from ..io_extension import io as _io
from ..shard import TAKEN_BYTES, Shard
from . import arrow_columns as tables

BUFFER_BYTES = 1 << 20
COLUMN_ROWS = 1024  # of the other columns read at a time: they may hold images
NUMBERS = {"FLOAT": "float32", "DOUBLE": "float64", "FIXED_LEN_BYTE_ARRAY": "float16"}
_LEVELS = ("max_definition", "max_repetition")
ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # the latter two are those of the levels


class NotDirect(ValueError):
    """A row group that pyarrow has to decode; the compiled reader has a `NotPlain`."""


class ParquetWriter(tables.TableWriter):
    """Write a parquet file; see `FormatWriter`. Rows are stored plain: they hardly compress."""

    suffixes = (".parquet",)

    def _open_table(self, file: Any) -> Any:
        schema, rows = self.columns.schema, self.columns.column
        others = [name for name in schema.names if name != rows]  # nested ones are plain too
        options = {"use_dictionary": others, "compression": dict.fromkeys(others, "snappy")}
        return tables.pyarrow().parquet.ParquetWriter(file, schema, **options)


@dataclass(frozen=True)
class ParquetShard(tables.TableShard):
    """One column of a parquet file."""

    format = "parquet"
    writer_class = ParquetWriter
    group_starts: np.ndarray = field(repr=False, compare=False)  # the first row of each, and all

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield rows that were copied from pages or decoded; see `Shard.pieces`."""
        with _opened(self.path) as (file, descriptor, _):
            pages = ColumnPages(file, descriptor, self)
            for group, (start, end) in enumerate(pairwise(_row_group_starts(file).tolist())):
                if first >= end:
                    continue
                with suppress(ValueError):  # pyarrow says what is wrong
                    for rows in self.filled(first, end, batch_rows, pages.reader(group, start)):
                        first += len(rows)
                        yield rows
                        del rows  # or its memory would be kept from the next batch
                if first < end:
                    yield from self._decoded(file, group, start, first, batch_rows)
                    first = end

    def _decoded(
        self, file: Any, group: int, row: int, first: int, batch_rows: int
    ) -> Iterator[np.ndarray]:
        """Yield the rows of a row group through pyarrow, from `first` on; `row` is its first."""
        end = row + file.metadata.row_group(group).num_rows
        for batch in file.iter_batches(batch_rows, columns=[self.column], row_groups=[group]):
            rows = tables.rows_of(batch.column(self.column), self, row)
            yield rows[max(0, first - row) :]
            row += len(rows)
        if row != end:
            problem = f"row group {group} has {row - end} rows more than its footer says"
            raise ValueError(f"{self.path}: {problem}; write it again")

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows at sorted `ids`; pyarrow reads the row groups of theirs."""
        taken = np.empty((len(ids), self.dimension), self.dtype)
        with self.noticing_changes(), _opened(self.path) as (file, descriptor, raw):
            pages, groups = ColumnPages(file, descriptor, self), self._groups_of(ids)
            for group in np.unique(groups).tolist():
                places = range(*np.searchsorted(groups, [group, group + 1]).tolist())
                start = int(self.group_starts[group])
                try:
                    read = pages.reader(group, start)
                    for place in places:
                        read(int(ids[place]), taken[place])
                except (ValueError, IndexError):  # the latter in a file that has changed
                    if self.path.is_remote:
                        raw.raw.ahead_until = _end_of_chunks(file, group, self.column)
                    row, wanted = int(ids[places.start]), slice(places.start, places.stop)
                    step = max(1, TAKEN_BYTES // self.row_bytes)
                    rows = self._decoded(file, group, start, row, step)
                    self.copy_selected(rows, row, ids[wanted], taken[wanted].view(np.uint8))
        self.check_unchanged()
        return taken.view(np.uint8)

    def rows_read(self, ids: np.ndarray) -> int:
        """Return the rows of the row groups that are decoded, and those alone of plain pages."""
        groups, counts = np.unique(self._groups_of(ids), return_counts=True)
        group_rows = np.diff(self.group_starts)[groups]
        if self.path.is_remote:
            return int(group_rows.sum())
        with _opened(self.path) as (file, descriptor, _):
            pages = ColumnPages(file, descriptor, self)
            for place, group in enumerate(groups.tolist()):
                with suppress(ValueError):
                    pages.of(group)
                    group_rows[place] = counts[place]
        return int(group_rows.sum())

    def _groups_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the row group of each row, int64."""
        return np.searchsorted(self.group_starts, ids, side="right") - 1

    def record_batches(self, names: list[str], first: int = 0) -> Iterator[Any]:
        """Yield columns as record batches of `COLUMN_ROWS` rows."""
        with _opened(self.path) as (file, *_):
            yield from file.iter_batches(COLUMN_ROWS, columns=names)


def read_shard(path: StoragePath, column: str | None = None) -> ParquetShard:
    """Open a column of rows of a parquet file; see `vectors_of` for its choice."""
    stamp = path.stamp()
    with _opened(path) as (file, *_):
        vectors = tables.vectors_of(
            path, file.schema_arrow, column, lambda name: file.iter_batches(16, columns=[name])
        )
        facts = stamp, file.schema_arrow, _row_group_starts(file)
        return ParquetShard(path, file.metadata.num_rows, *vectors, *facts)


def _row_group_starts(file: Any) -> np.ndarray:
    """Return the number of the first row of each row group, and that of all rows, int64."""
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return np.cumsum([0, *counts], dtype=np.int64)


def _end_of_chunks(file: Any, group: int, name: str) -> int:
    """Return the byte behind the column of this name in a row group, as the footer says."""
    columns = file.metadata.row_group(group)
    chunks = [columns.column(leaf) for leaf in range(columns.num_columns)]
    return max(
        int((chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size)
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] == name.partition(".")[0]
    )


@contextmanager
def _opened(path: StoragePath) -> Iterator[tuple[Any, int | None, Any]]:
    """Yield a `pyarrow.parquet.ParquetFile`, its descriptor (None for a URL), and its source."""
    with explained(path), path.open("rb") as raw:
        with tables.decoded(path, raw):
            descriptor = None if path.is_remote else raw.fileno()
            # Checksums are compared where a page has one: few writers add them.
            options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
            options["page_checksum_verification"] = True
            yield tables.pyarrow().parquet.ParquetFile(raw, **options), descriptor, raw


class ColumnPages:
    """The pages of the rows of an open `ParquetFile`; `descriptor` is None if it is remote."""

    def __init__(self, file: Any, descriptor: int | None, shard: Shard) -> None:
        self._file, self._descriptor, self._shard = file, descriptor, shard

    def reader(self, group: int, start: int) -> Callable[[int, np.ndarray], object]:
        """Return the function that fills an array with rows of a group, which begins at `start`."""
        pages = self.of(group)
        return lambda row, rows: pages.read(row - start, rows)

    def of(self, group: int) -> Any:
        """Return the pages of a row group, as `_io.ParquetPages`, or raise `NotDirect`."""
        if not _io or self._descriptor is None:
            raise NotDirect
        leaf, chunks = self._chunks
        chunk, (row_values, value_bytes) = chunks[group], _sizes(leaf, self._shard)
        rows, start, end = chunk.group_rows, chunk.data_offset, chunk.data_offset + chunk.bytes
        is_inside = 0 <= start <= end <= os.fstat(self._descriptor).st_size
        is_encoded = chunk.has_dictionary or not {*chunk.encodings} <= ENCODINGS
        is_plain = chunk.codec == "UNCOMPRESSED" and not (chunk.is_elsewhere or is_encoded)
        if not (is_plain and is_inside) or chunk.values != rows * row_values:
            raise NotDirect
        sizes = {"rows": rows, "row_values": row_values, "value_bytes": value_bytes}
        levels = {name: getattr(leaf, f"{name}_level") for name in _LEVELS}
        return _io.ParquetPages(self._descriptor, start, end, **sizes, **levels)

    @cached_property
    def _chunks(self) -> tuple[Any, list[Any]]:
        """The leaf of the column in the schema, and its chunk in each row group."""
        schema, name = self._file.schema, self._shard.column
        paths = [schema.column(i).path for i in range(len(schema))]
        leaves = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
        if len(leaves) != 1:
            raise NotDirect
        chunks = _io.read_chunks(self._descriptor, leaves[0])
        if len(chunks) != self._file.num_row_groups:  # the file has changed
            raise NotDirect
        return schema.column(leaves[0]), chunks


def _sizes(leaf: Any, shard: Shard) -> tuple[int, int]:
    """Return the number of values in a row, and the size of each in bytes."""
    physical_type, size = leaf.physical_type, shard.dtype.itemsize
    row_bytes = shard.dimension * size
    fixed = physical_type == "FIXED_LEN_BYTE_ARRAY"
    if leaf.max_repetition_level == 0 and fixed and leaf.length == row_bytes:
        return 1, row_bytes
    if leaf.max_repetition_level == 1 and NUMBERS.get(physical_type) == shard.dtype.name:
        if not fixed or leaf.length == size:
            return shard.dimension, size
    raise NotDirect
