"""Parquet files: one column of rows; the other columns are carried through.

Row groups whose rows lie in the file as numbers are copied out of it (`parquet_pages.py`); pyarrow
decodes the others, and says what is wrong with their rows. It does so in pieces of a batch, through
a buffer of `BUFFER_BYTES`: memory is bounded by the batch and the file's pages, never by a row
group. A result has a row group for each batch, which can be read directly.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.paths import StoragePath, explained
from ..streamed_shard import Buffers
from .arrow_columns import (
    TableShard,
    TableWriter,
    decoded,
    pyarrow,
    rows_of,
    validated,
    vectors_of,
)
from .parquet_pages import NOT_PLAIN, ColumnPages, NotDirect, read_pages

BUFFER_BYTES = 1 << 20
COLUMN_ROWS = 1024  # of the other columns read at a time: they may hold images


class ParquetWriter(TableWriter):
    """Write a parquet file; see `FormatWriter`. Rows are stored plain: they hardly compress."""

    suffixes = (".parquet",)

    def _open_table(self, file: Any) -> Any:
        return pyarrow().parquet.ParquetWriter(file, self.columns.schema, **self._codecs())

    def _codecs(self) -> dict[str, Any]:
        """Return the options for dictionaries and compression of every column but the rows."""
        sink, rows = pyarrow().BufferOutputStream(), self.columns.column
        pyarrow().parquet.ParquetWriter(sink, self.columns.schema).close()
        leaves = pyarrow().parquet.ParquetFile(sink.getvalue()).schema
        paths = [leaves.column(i).path for i in range(len(leaves))]
        names = [path for path in paths if path != rows and not path.startswith(f"{rows}.")]
        return {"use_dictionary": names, "compression": dict.fromkeys(names, "snappy")}


@dataclass(frozen=True)
class ParquetShard(TableShard):
    """One column of a parquet file."""

    format = "parquet"
    writer_class = ParquetWriter

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield rows that were copied from pages or decoded; see `StreamedShard.pieces`."""
        with _opened(self.path) as (file, descriptor):
            ends, buffers = _row_group_ends(file), Buffers(self, batch_rows)
            column_pages = ColumnPages(file, descriptor, self)
            group = int(np.searchsorted(ends, first, side="right"))  # the first that is needed
            row = int(ends[group - 1]) if group else 0
            for number in range(group, len(ends)):
                end = int(ends[number])
                with suppress(NotDirect):
                    pages = column_pages.of(number)
                    for rows in read_pages(pages, buffers, row, first, end):
                        first += len(rows)
                        yield rows
                if first < end:
                    yield from self._decoded(file, number, row, first, batch_rows)
                first = row = end

    def _decoded(
        self, file: Any, group: int, row: int, first: int, batch_rows: int
    ) -> Iterator[np.ndarray]:
        """Yield the rows of a row group through pyarrow, from `first` on; `row` is its first."""
        end = row + file.metadata.row_group(group).num_rows
        for batch in file.iter_batches(batch_rows, columns=[self.column], row_groups=[group]):
            rows = rows_of(batch.column(0), self)
            yield rows[max(0, first - row) :]
            row += len(rows)
        if row != end:
            problem = f"row group {group} has {row - end} rows more than its footer says"
            raise ValueError(f"{self.path}: {problem}; write it again")

    def take_rows(self, ids: np.ndarray) -> np.ndarray:
        """Read the rows at sorted `ids`: only they are read, unless pyarrow has to decode some."""
        if self.path.is_remote:
            return super().take_rows(ids)
        if self.path.stamp() != self.stamp:
            raise self.changed_error()
        taken = np.empty((len(ids), self.dimension), self.dtype)
        with _opened(self.path) as (file, descriptor):
            ends = _row_group_ends(file)
            if ends[-1:].sum() != self.num_rows:
                raise self.changed_error()
            cuts, column_pages = np.searchsorted(ids, ends), ColumnPages(file, descriptor, self)
            for group in np.flatnonzero(np.diff(cuts, prepend=0)):
                row = int(ends[group - 1]) if group else 0
                try:
                    pages = column_pages.of(int(group))
                    for place in range(cuts[group - 1] if group else 0, cuts[group]):
                        pages.read(int(ids[place]) - row, taken[place])
                except NOT_PLAIN:
                    return super().take_rows(ids)
        return taken

    def why_decoded(self) -> str:
        """Return why pyarrow reads row groups of this file; empty if all are read directly.

        All pages are looked through, without their numbers.
        """
        with _opened(self.path) as (file, descriptor):
            column_pages = ColumnPages(file, descriptor, self)
            for group in range(file.num_row_groups):
                try:
                    column_pages.of(group).check()
                except NOT_PLAIN as reason:
                    return f"row group {group}: {reason}"
        return ""

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the file."""
        with _opened(self.path) as (file, _):
            return file.schema_arrow

    def other_columns(self) -> Iterator[Any]:
        """Yield the columns other than the rows as record batches of `COLUMN_ROWS` rows."""
        with _opened(self.path) as (file, _):
            names = [name for name in file.schema_arrow.names if name != self.column]
            yield from map(validated, file.iter_batches(COLUMN_ROWS, columns=names))


def read_shard(path: StoragePath, column: str | None = None) -> ParquetShard:
    """Open a column of rows of a parquet file; see `vectors_of` for its choice."""
    stamp = path.stamp()
    with _opened(path) as (file, _):

        def arrays(name: str) -> Iterator[Any]:
            return (batch.column(0) for batch in file.iter_batches(16, columns=[name]))

        name, dtype, dimension = vectors_of(path, file.schema_arrow, column, arrays)
        return ParquetShard(path, file.metadata.num_rows, dimension, dtype, name, stamp)


def _row_group_ends(file: Any) -> np.ndarray:
    """Return the number of the row behind each row group, int64 `[row groups]`."""
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return np.cumsum(counts, dtype=np.int64)


@contextmanager
def _opened(path: StoragePath) -> Iterator[tuple[Any, int | None]]:
    """Yield a `pyarrow.parquet.ParquetFile`, and the descriptor that it reads; None for a URL."""
    with explained(path), path.open("rb") as raw:
        with decoded(path, raw):
            try:
                descriptor = raw.fileno()
            except io.UnsupportedOperation:
                descriptor = None
            # Checksums are compared where a page has one: few writers add them.
            options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
            options["page_checksum_verification"] = True
            yield pyarrow().parquet.ParquetFile(raw, **options), descriptor
