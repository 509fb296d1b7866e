"""Rows that lie in no file: tables and frames in Arrow's terms, and datasets of Hugging Face.

A table is any object with Arrow's stream interface (`__arrow_c_stream__`): of pyarrow, pandas,
polars, DuckDB. It is turned into a `pyarrow.Table` once, without a copy where its library keeps
Arrow's memory. A column alone (a Series) is a table of its rows. A `Dataset` of the datasets
library is read in pieces; so is an `IterableDataset`, which is read once more to count its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...storage.local import LocalPath
from . import arrow_columns as tables
from .arrow import ArrowWriter

PIECE_ROWS = 1024  # of a dataset or a table at a time


class MemoryPath(LocalPath):
    """The name of a table or dataset, where a shard has the path of its file."""

    def stamp(self) -> tuple[int, int]:
        """Return a constant: nothing in memory is compared."""
        return 0, 0

    def identity(self) -> dict[str, int | str]:
        """Raise a TypeError: no other process and no later run could find the rows."""
        raise TypeError(f"{self}: its rows are in memory, expected files; save it as parquet first")


@dataclass(frozen=True)
class MemoryShard(tables.TableShard):
    """One column of a table or dataset."""

    data: Any = field(repr=False, compare=False)  # a `pyarrow.Table`, or a dataset in Arrow's form
    table_schema: Any = field(repr=False, compare=False)

    format = "arrow"
    writer_class = ArrowWriter

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the table."""
        return self.table_schema

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield the rows of each record batch; see `StreamedShard.pieces`."""
        for batch in _record_batches(self.data, [tables.root_of(self.schema, self.column)], first):
            yield tables.rows_of(tables.column_of(batch, self.column), self)

    def record_batches(self, names: list[str]) -> Iterator[Any]:
        """Yield columns as record batches."""
        return _record_batches(self.data, names)


def is_table(data: object) -> bool:
    """Return whether rows can be read from an object as from a table."""
    return hasattr(data, "__arrow_c_stream__") or _is_dataset(data)


def read_table(data: Any, column: str | None = None) -> MemoryShard:
    """Open a column of rows of a table or dataset; see `vectors_of` for its choice."""
    pa, path = tables.pyarrow(), MemoryPath(type(data).__name__)
    try:
        if _is_dataset(data):
            data = data.with_format("arrow")
            schema = next((table.schema for table in data.iter(1)), pa.schema([]))
        else:
            is_column = not (hasattr(data, "columns") or hasattr(data, "schema"))
            table = {column or tables.DEFAULT: pa.chunked_array(data)} if is_column else data
            data = pa.table(table)
            schema = data.schema
    except (pa.ArrowException, TypeError) as error:
        reason = " ".join(str(error).split())
        expected = "expected columns of one type each, and vectors of one length"
        raise TypeError(f"{path}: cannot become an Arrow table ({reason}); {expected}") from error

    def arrays(name: str) -> Iterator[Any]:
        root = tables.root_of(schema, name)
        return (tables.column_of(batch, name) for batch in _record_batches(data, [root]))

    name, dtype, dimension = tables.vectors_of(path, schema, column, arrays)
    has_length = hasattr(data, "__len__")
    num_rows = len(data) if has_length else sum(map(len, arrays(name)))
    return MemoryShard(path, num_rows, dimension, dtype, name, path.stamp(), data, schema)


def _is_dataset(data: object) -> bool:
    return all(hasattr(data, name) for name in ("with_format", "select_columns", "iter"))


def _record_batches(data: Any, names: list[str], first: int = 0) -> Iterator[Any]:
    """Yield columns from row `first` on."""
    if not _is_dataset(data):
        yield from data.select(names).slice(first).to_batches(PIECE_ROWS)
        return
    for table in data.select_columns(names).skip(first).iter(PIECE_ROWS):
        yield from table.combine_chunks().to_batches()
