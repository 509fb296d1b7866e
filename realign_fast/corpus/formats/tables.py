"""Shards and writers of the table formats, parquet and Arrow, which have other columns."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from ...storage.paths import AnyPath, explained, output_path
from ..shard_writer import FormatWriter
from ..streamed_shard import StreamedShard
from .arrow_columns import DEFAULT, VectorColumn, array_of, pyarrow


class TableShard(StreamedShard):
    """One column of a table."""

    @property
    @abstractmethod
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the file."""

    @property
    def vectors(self) -> VectorColumn:
        """The column of the rows."""
        return VectorColumn(self.column, self.dtype, self.dimension)

    @property
    def has_other_columns(self) -> bool:
        """True if the table has other columns than the rows."""
        return len(self.schema) > 1

    @property
    def table_columns(self) -> TableColumns:
        """The columns of a result of this shard."""
        other_columns = self.other_columns if self.has_other_columns else None
        return TableColumns(self.schema, self.column, other_columns)


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table that is written."""

    schema: Any  # a `pyarrow.Schema` of all of them
    column: str = DEFAULT  # name of the rows
    # Yields the other columns as record batches of any size, as many rows in all.
    other_columns: Callable[[], Iterator[Any]] | None = None


class TableWriter(FormatWriter):
    """Write a table; each batch of rows becomes one record batch or row group.

    Its `source` is a `TableColumns`. A format implements `_open_table`.
    """

    def _open_table(self, file: Any) -> Any:
        """Return pyarrow's writer of `self.columns.schema` to a file."""
        raise NotImplementedError

    def _begin(self) -> None:
        self.columns = self._source or TableColumns(plain_schema(self.dimension, self.dtype))
        other_columns = self.columns.other_columns
        self._batches = iter(other_columns()) if other_columns else None
        self._unwritten: Any = None  # rows of the last record batch of the other columns
        self._buffered = io.BufferedWriter(self._file, 1 << 20)
        self._table = self._open_table(pyarrow().PythonFile(self._buffered, "w"))

    def _append(self, rows: np.ndarray) -> None:
        pa, schema = pyarrow(), self.columns.schema
        parts = list(self._next_parts(self._batches, len(rows))) if self._batches else []
        columns = pa.Table.from_batches(parts).columns if parts else []
        index = schema.get_field_index(self.columns.column)
        array = array_of(rows, schema.field(index).type)
        columns = [*columns[:index], array, *columns[index:]]
        self._table.write_table(pa.Table.from_arrays(columns, schema=schema))

    def _next_parts(self, batches: Iterator[Any], count: int) -> Iterator[Any]:
        """Yield the next `count` rows of the other columns, as slices of their record batches."""
        while count:
            if not self._unwritten:
                self._unwritten = next(batches, None)
                if self._unwritten is None:
                    problem = f"the other columns of its source end before row {self.written}"
                    raise ValueError(f"{self.path}: {problem}; write that source again")
            part = self._unwritten.slice(0, count)
            self._unwritten = self._unwritten.slice(len(part))
            count -= len(part)
            yield part

    def _finish(self) -> None:
        self._table.close()
        self._buffered.flush()

    def _abandon(self) -> None:
        with suppress(OSError, ValueError, pyarrow().ArrowException):  # the file is removed anyway
            self._table.close()


def write_table(path: AnyPath, schema: Any, batches: Iterator[Any]) -> None:
    """Write record batches of `schema` to a parquet file that appears whole or not at all."""
    path = output_path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.pending_file() as file:
            _write_batches(file, schema, batches)


def _write_batches(file: IO[bytes], schema: Any, batches: Iterator[Any]) -> None:
    with pyarrow().parquet.ParquetWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def plain_schema(dimension: int, dtype: torch.dtype, other_fields: Any = ()) -> Any:
    """Return the schema of a table that no file prescribes: `other_fields`, then `embedding`."""
    pa = pyarrow()
    values = pa.from_numpy_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    return pa.schema([*other_fields, pa.field(DEFAULT, pa.list_(values, dimension))])


def validated(batch: Any) -> Any:
    """Return a record batch after a full check, so that no damage is copied on."""
    batch.validate(full=True)
    return batch
