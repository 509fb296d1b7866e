"""Tables in Arrow's terms: the column of rows, its values as numpy rows, shards and writers.

A column of rows is a list, large list or fixed-size list of half, float or double; or a fixed-size
binary whose number type stands in the metadata of its field (`dtype`) or in the name that asks for
it (`embedding:float16`). This is the one file that imports pyarrow.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..._extras import import_extra
from ...storage.paths import AnyPath, StoragePath, explained, output_path
from ..shard import MAX_COLUMNS
from ..shard_writer import FormatWriter
from ..streamed_shard import StreamedShard

DEFAULT = "embedding"
FLOATS = ("float16", "float32", "float64")
_USER = "A parquet or Arrow file"


def pyarrow() -> ModuleType:
    """Import pyarrow, with what it has for Arrow files and for parquet."""
    import_extra("pyarrow.ipc", "parquet", _USER)
    import_extra("pyarrow.parquet", "parquet", _USER)
    return import_extra("pyarrow", "parquet", _USER)


@contextmanager
def decoded(path: AnyPath, file: Any = None) -> Iterator[None]:
    """Raise pyarrow's errors about a file that it cannot read again, with the name of the file.

    The error of a remote `file` is raised in their place: pyarrow may keep only its message.
    """
    try:
        yield
    except (pyarrow().ArrowException, UnicodeDecodeError, OSError) as error:
        if remote_error := getattr(getattr(file, "raw", None), "error", None):
            raise remote_error from None
        if isinstance(error, OSError) and error.errno:
            raise
        advice = "truncated, damaged or of another format; write it again"
        reason = " ".join(str(error).split())  # pyarrow's messages may have several lines
        raise ValueError(f"{path}: cannot be read ({reason}): {advice}") from error


def vectors_of(
    path: StoragePath, schema: Any, column: str | None, arrays: Callable[[str], Iterator[Any]]
) -> tuple[str, np.dtype[Any], int]:
    """Return name, number type and dimension of the column of rows of a `pyarrow.Schema`.

    `column` is its `name` or `name:dtype`, or None for `embedding`. `arrays(name)` yields a column;
    the first row of lists says their dimension.

    Raises:
        TypeError: the column holds no vectors of float16, float32 or float64.
        ValueError: there is no such column, or its rows have no numbers.
    """
    name, _, stated = (column or DEFAULT).rpartition(":")
    if stated not in FLOATS:
        name, stated = column or DEFAULT, ""
    if schema.names.count(name) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "no column"
        number = "no column" if name not in schema.names else "two columns"
        raise ValueError(f"{path}: has {number} {name!r}; choose one as the column, of: {columns}")
    field, types = schema.field(name), pyarrow().types
    column_type, place = field.type, f"{path}: column {name!r}"
    if types.is_fixed_size_binary(column_type):
        metadata = field.metadata or {}
        stated = stated or metadata.get(b"dtype", b"").decode(errors="replace")
        dtype = _dtype_of_binary(place, name, column_type, stated)
        return name, dtype, _checked_dimension(place, column_type.byte_width // dtype.itemsize)
    is_fixed = types.is_fixed_size_list(column_type)
    if not (is_fixed or types.is_list(column_type) or types.is_large_list(column_type)):
        expected = "expected a list, fixed-size list or fixed-size binary of numbers"
        raise TypeError(f"{place} is {column_type}, {expected}; choose another column")
    if not types.is_floating(column_type.value_type):
        expected = "expected half, float or double; cast the column"
        raise TypeError(f"{place} holds {column_type.value_type}, {expected}")
    dtype = np.dtype(column_type.value_type.to_pandas_dtype())
    if stated and dtype != stated:
        raise TypeError(f"{place} holds {dtype}, asked for was {stated}; leave {stated} out")
    length = column_type.list_size if is_fixed else _first_length(place, arrays(name))
    return name, dtype, _checked_dimension(place, length)


def _dtype_of_binary(place: str, name: str, column_type: Any, stated: str) -> np.dtype[Any]:
    if stated not in FLOATS:
        advice = f"ask for column {name + ':float16'!r} (or float32, float64)"
        raise TypeError(f"{place} is {column_type}, which does not say its number type; {advice}")
    dtype = np.dtype(stated)
    if column_type.byte_width % dtype.itemsize:
        expected = f"expected a multiple of {dtype.itemsize} for {stated}"
        raise TypeError(f"{place} is {column_type}, {expected}; ask for another number type")
    return dtype


def _checked_dimension(place: str, dimension: int) -> int:
    if not 0 < dimension < MAX_COLUMNS:
        raise ValueError(f"{place} has {dimension} numbers a row, expected 1 or more")
    return dimension


def _first_length(place: str, arrays: Iterator[Any]) -> int:
    """Return the length of the first row of a column of lists."""
    array = next((array for array in arrays if len(array)), None)
    if array is not None:
        array.validate()  # or a damaged offset would be followed
    if array is None or not array[0].is_valid:
        problem = "has no rows" if array is None else "is null in row 0"
        advice = "leave it out or write it"
        raise ValueError(f"{place} {problem}, so nothing says its dimension; {advice}")
    return len(array[0])


def rows_of(array: Any, shard: StreamedShard, first: int) -> np.ndarray:
    """Return rows `[n, D]` that view the memory of a `pyarrow.Array`, which begins at row `first`.

    Nulls and rows of another length are a `ValueError`.
    """
    place, dimension = f"{shard.path}: column {shard.column!r}", shard.dimension
    array.validate()  # offsets and buffers have not been read yet, and may not fit
    if array.null_count:
        row = first + array.is_null().to_numpy(zero_copy_only=False).argmax()
        raise ValueError(f"{place}: row {row} is null, expected numbers; fill it or drop the row")
    count = len(array) * dimension
    if pyarrow().types.is_fixed_size_binary(array.type):
        start, data = array.offset * dimension, array.buffers()[1]
    else:
        if not pyarrow().types.is_fixed_size_list(array.type):
            _check_lengths(array, dimension, place, first)
        values = array.flatten()
        if values.null_count:
            null = values.is_null().to_numpy(zero_copy_only=False).argmax()
            row = first + null // dimension
            raise ValueError(f"{place}: row {row} has a null in it; fill it or drop the row")
        start, data = values.offset, values.buffers()[1]
    if not count:
        return np.empty((0, dimension), shard.dtype)
    flat = np.frombuffer(data, shard.dtype, count, start * shard.dtype.itemsize)
    return flat.reshape(-1, dimension)


def _check_lengths(array: Any, dimension: int, place: str, first: int) -> None:
    lengths = np.diff(array.offsets.to_numpy())
    if (wrong := lengths != dimension).any():
        row = int(wrong.argmax())
        actual = f"row {first + row} has {lengths[row]} numbers"
        expected = f"expected {dimension} as in row 0"
        raise ValueError(f"{place}: {actual}, {expected}; lists must be of one length")


def array_of(rows: np.ndarray, column_type: Any) -> Any:
    """Return rows `[n, D]` as a `pyarrow.Array` of a list or binary type; the memory is shared."""
    pa = pyarrow()
    data = pa.py_buffer(rows.reshape(-1))
    if pa.types.is_fixed_size_binary(column_type):
        return pa.Array.from_buffers(column_type, len(rows), [None, data])
    values = pa.Array.from_buffers(column_type.value_type, rows.size, [None, data])
    if pa.types.is_fixed_size_list(column_type):
        return pa.FixedSizeListArray.from_arrays(values, type=column_type)
    offset_type = np.int64 if pa.types.is_large_list(column_type) else np.int32
    if rows.size > np.iinfo(offset_type).max:
        raise ValueError(f"got {rows.size} numbers for one list array; write fewer rows at a time")
    offsets = pa.py_buffer(np.arange(0, rows.size + 1, rows.shape[1], dtype=offset_type))
    array_class = type(pa.array([], column_type))
    return array_class.from_buffers(column_type, len(rows), [None, offsets], children=[values])


class TableShard(StreamedShard):
    """One column of a table."""

    @property
    @abstractmethod
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the file."""

    @property
    def has_other_columns(self) -> bool:
        """True if the table has other columns than the rows."""
        return len(self.schema) > 1


class TableColumns(NamedTuple):
    """The columns of a table that is written; a `TableShard` has them too."""

    schema: Any  # a `pyarrow.Schema` of all of them
    column: str = DEFAULT  # name of the rows
    # Yields the other columns as record batches of any size, as many rows in all.
    other_columns: Callable[[], Iterator[Any]] = lambda: iter(())


class TableWriter(FormatWriter):
    """Write a table; each batch of rows becomes one record batch or row group.

    Its `source` is a `TableShard` or `TableColumns`. A format implements `_open_table`.
    """

    def _open_table(self, file: Any) -> Any:
        """Return pyarrow's writer of `self.columns.schema` to a file."""
        raise NotImplementedError

    def _begin(self) -> None:
        columns = self._source or TableColumns(plain_schema(self.dimension, self.dtype))
        self.columns = TableColumns(columns.schema, columns.column, columns.other_columns)
        self._batches = self.columns.other_columns() if len(self.columns.schema) > 1 else None
        self._unwritten: Any = None  # rows of the other columns, a `pyarrow.Table`
        self._buffered = io.BufferedWriter(self._file, 1 << 20)
        self._table = self._open_table(pyarrow().PythonFile(self._buffered, "w"))

    def _append(self, rows: np.ndarray) -> None:
        schema = self.columns.schema
        index = schema.get_field_index(self.columns.column)
        columns = self._next_columns(self._batches, len(rows)) if self._batches else []
        columns.insert(index, array_of(rows, schema.field(index).type))
        self._table.write_table(pyarrow().Table.from_arrays(columns, schema=schema))

    def _next_columns(self, batches: Iterator[Any], count: int) -> list[Any]:
        """Return the next `count` rows of the other columns."""
        parts, pa = [self._unwritten] if self._unwritten else [], pyarrow()
        while sum(map(len, parts)) < count:
            if (batch := next(batches, None)) is None:
                problem = f"the other columns of its source end before row {self.written}"
                raise ValueError(f"{self.path}: {problem}; write that source again")
            parts.append(pa.Table.from_batches([batch]))
        rows = pa.concat_tables(parts)
        self._unwritten = rows.slice(count)
        return list(rows.slice(0, count).columns)

    def _finish(self) -> None:
        self._table.close()
        self._buffered.flush()

    def _abandon(self) -> None:
        with suppress(OSError, ValueError, pyarrow().ArrowException):  # the file is removed anyway
            self._table.close()


def write_table(path: AnyPath, schema: Any, batches: Iterator[Any]) -> None:
    """Write record batches of `schema` to a parquet file that appears whole or not at all."""
    path, parquet = output_path(path), pyarrow().parquet
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.pending_file() as file, parquet.ParquetWriter(file, schema) as writer:
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
