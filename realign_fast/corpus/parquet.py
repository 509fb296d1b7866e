"""A shard in a parquet file: one column of rows; the other columns are carried through.

Row groups are decoded in pieces of a batch, through a buffer of `BUFFER_BYTES`: memory is bounded
by the batch and the file's pages, never by a row group. A result has a row group for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .npy import explained
from .streamed import StreamedShard, stamp_of, torch_dtype
from .table import (
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

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetShard(StreamedShard):
    format = "parquet"

    def pieces(self, first: int, size: int) -> Iterator[np.ndarray]:
        vectors = Vectors(self.column, self.dtype, self.dimension)
        with _opened(self.path) as file:
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum(counts)
            group = int(np.searchsorted(ends, first, side="right"))  # the first that is needed
            row = int(ends[group - 1]) if group else 0
            groups = list(range(group, len(counts)))
            options = {"columns": [self.column], "row_groups": groups}
            for batch in file.iter_batches(size, **options):
                rows = rows_of(batch.column(0), vectors, self.path, row)
                yield rows[max(0, first - row) :]
                row += len(rows)

    @property
    def schema(self) -> Any:
        with _opened(self.path) as file:
            return file.schema_arrow

    @property
    def others(self):
        return self._other_columns if len(self.schema) > 1 else None

    def _other_columns(self) -> Iterator[Any]:
        with _opened(self.path) as file:
            names = [name for name in file.schema_arrow.names if name != self.column]
            yield from map(checked, file.iter_batches(OTHER_ROWS, columns=names))

    def writer(self, path: Path) -> ParquetWriter:
        shape = (self.rows, self.dimension, torch_dtype(self))
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


def read_shard(path: Path, column: str | None = None) -> ParquetShard:
    stamp = stamp_of(path)
    with _opened(path) as file:
        vectors = vectors_of(path, file.schema_arrow, column)
        rows, dimension = file.metadata.num_rows, vectors.dimension
        if dimension is None:
            batches = file.iter_batches(1, columns=[vectors.name])
            arrays = (batch.column(0) for batch in batches)
            dimension = first_dimension(path, vectors.name, arrays)
    return ParquetShard(path, rows, dimension, vectors.dtype, vectors.name, stamp)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with explained(path), path.open("rb") as raw:
        with decoded(path, raw):
            options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
            yield pyarrow().parquet.ParquetFile(raw, **options)
