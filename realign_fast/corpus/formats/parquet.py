"""A shard in a parquet file: one column of rows; the other columns are carried through.

Row groups whose rows lie in the file as numbers are copied out of it (`parquet_direct.py`); pyarrow
decodes the others, and says what is wrong with their rows. It does so in pieces of a batch, through
a buffer of `BUFFER_BYTES`: memory is bounded by the batch and the file's pages, never by a row
group. A result has a row group for each batch, which can be read directly.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, StoragePath, explained
from ..streamed_shard import Buffers, StreamedShard, torch_dtype
from .arrow_columns import (
    OTHER_ROWS,
    TableWriter,
    Vectors,
    checked,
    decoded,
    first_dimension,
    pyarrow,
    rows_of,
    vectors_of,
)
from .npy import changed
from .parquet_pages import NOT_PLAIN, NotDirect, pages_of, read_pages

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetShard(StreamedShard):
    format = "parquet"

    def pieces(self, first: int, size: int) -> Iterator[np.ndarray]:
        with _opened(self.path) as (file, descriptor):
            ends, buffers = _ends(file), Buffers(self, size)
            group = int(np.searchsorted(ends, first, side="right"))  # the first that is needed
            row = int(ends[group - 1]) if group else 0
            numbers = range(group, len(ends))
            for pages, groups in groupby(numbers, partial(self._pages, file, descriptor)):
                groups = list(groups)  # one with pages, or several without
                end = int(ends[groups[-1]])
                for rows in read_pages(pages, buffers, row, first, end) if pages else ():
                    first += len(rows)
                    yield rows
                if first < end:
                    yield from self._decoded(file, groups, row, first, size)
                first = row = end

    def _pages(self, file: Any, descriptor: int | None, group: int) -> Any:
        """The rows of a row group, or None: they are pyarrow's."""
        try:
            return pages_of(file, descriptor, group, self._vectors)
        except NotDirect:
            return None

    def _decoded(
        self, file: Any, groups: list[int], row: int, first: int, size: int
    ) -> Iterator[np.ndarray]:
        """The rows of row groups through pyarrow, from `first` on; `row` is their first one."""
        for batch in file.iter_batches(size, columns=[self.column], row_groups=groups):
            rows = rows_of(batch.column(0), self._vectors, self.path, row)
            yield rows[max(0, first - row) :]
            row += len(rows)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows at sorted `ids`: only they are read, unless pyarrow has to decode some."""
        if self.path.is_remote:
            return super().take(ids)
        if self.path.stamp() != self.stamp:
            raise changed(self)
        out = np.empty((len(ids), self.dimension), self.dtype)
        with _opened(self.path) as (file, descriptor):
            ends = _ends(file)
            if ends[-1:].sum() != self.num_rows:
                raise changed(self)
            cuts = np.searchsorted(ids, ends)
            for group in np.flatnonzero(np.diff(cuts, prepend=0)):
                row = int(ends[group - 1]) if group else 0
                try:
                    pages = pages_of(file, descriptor, int(group), self._vectors)
                    for place in range(cuts[group - 1] if group else 0, cuts[group]):
                        pages.read(int(ids[place]) - row, out[place])
                except NOT_PLAIN:
                    return super().take(ids)
        return out

    def why_decoded(self) -> str:
        """Why pyarrow reads row groups of this file; empty if all are read directly.

        All pages are looked through, without their numbers.
        """
        with _opened(self.path) as (file, descriptor):
            for group in range(file.num_row_groups):
                try:
                    pages_of(file, descriptor, group, self._vectors).check()
                except NOT_PLAIN as why:
                    return f"row group {group}: {why}"
        return ""

    @property
    def _vectors(self) -> Vectors:
        return Vectors(self.column, self.dtype, self.dimension)

    @property
    def schema(self) -> Any:
        with _opened(self.path) as (file, _):
            return file.schema_arrow

    @property
    def others(self):
        return self._other_columns if len(self.schema) > 1 else None

    def _other_columns(self) -> Iterator[Any]:
        with _opened(self.path) as (file, _):
            names = [name for name in file.schema_arrow.names if name != self.column]
            yield from map(checked, file.iter_batches(OTHER_ROWS, columns=names))

    def writer(self, path: AnyPath) -> ParquetWriter:
        shape = (self.num_rows, self.dimension, torch_dtype(self))
        return ParquetWriter(path, *shape, self.schema, self.column, self.others)


class ParquetWriter(TableWriter):
    """`ShardWriter` for a parquet file. Rows are stored plain: embeddings hardly compress."""

    suffix = ".parquet"

    def _sink(self, file: Any) -> Any:
        return pyarrow().parquet.ParquetWriter(file, self.schema, **self._codecs())

    def _codecs(self) -> dict[str, Any]:
        """Dictionaries and compression for every column but the rows."""
        sink = pyarrow().BufferOutputStream()
        pyarrow().parquet.ParquetWriter(sink, self.schema).close()
        leaves = pyarrow().parquet.ParquetFile(sink.getvalue()).schema
        paths = [leaves.column(i).path for i in range(len(leaves))]
        names = [p for p in paths if p != self.column and not p.startswith(f"{self.column}.")]
        return {"use_dictionary": names, "compression": dict.fromkeys(names, "snappy")}


def read_shard(path: StoragePath, column: str | None = None) -> ParquetShard:
    stamp = path.stamp()
    with _opened(path) as (file, _):
        vectors = vectors_of(path, file.schema_arrow, column)
        rows, dimension = file.metadata.num_rows, vectors.dimension
        if dimension is None:
            batches = file.iter_batches(1, columns=[vectors.name])
            arrays = (batch.column(0) for batch in batches)
            dimension = first_dimension(path, vectors.name, arrays)
    return ParquetShard(path, rows, dimension, vectors.dtype, vectors.name, stamp)


def _ends(file: Any) -> np.ndarray:
    """The row behind each row group."""
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return np.cumsum(counts, dtype=np.int64)


@contextmanager
def _opened(path: StoragePath) -> Iterator[tuple[Any, int | None]]:
    """pyarrow's reader, and the descriptor that it reads; None where the file has none."""
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
