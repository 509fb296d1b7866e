"""Tables in Arrow's terms: the column of rows, its values as numpy rows, shards and writers.

A column of rows is a list, large list or fixed-size list of half, float or double; a tensor type of
Arrow or Ray with the shape `[D]` or `[1, D]`, which is stored as such lists; or a fixed-size
binary whose number type stands in the metadata of its field (`dtype`) or in the name
that asks for it (`embedding:float16`). A row that is null or empty, and a number that is null, are
read as NaN; a row of another length is an error. This is the one file that imports pyarrow.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..._extras import import_extra
from ...storage.paths import AnyPath, StoragePath, explained, output_path
from ..shard import MAX_COLUMNS, FormatWriter, Shard, selected

DEFAULT = "embedding"
FLOATS = ("float16", "float32", "float64")
_USER = "A parquet or Arrow file"


def pyarrow() -> ModuleType:
    """Import pyarrow, with its parts that are not imported on their own."""
    import_extra("pyarrow.compute", "parquet", _USER)
    import_extra("pyarrow.ipc", "parquet", _USER)
    return import_extra("pyarrow.parquet", "parquet", _USER)


@contextmanager
def decoded(path: AnyPath, file: Any = None) -> Iterator[None]:
    """Raise pyarrow's errors again with the path; the error of a remote `file` in their place."""
    try:
        yield
    except (pyarrow().ArrowException, UnicodeDecodeError, OSError) as error:
        if remote_error := getattr(getattr(file, "raw", None), "error", None):
            raise remote_error from None  # pyarrow may keep only its message
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())  # pyarrow's messages may have several lines
        advice = "truncated, damaged or of another format; write it again"
        raise ValueError(f"{path}: cannot be read ({reason}): {advice}") from error


def vectors_of(
    path: StoragePath, schema: Any, column: str | None, batches: Callable[[str], Iterator[Any]]
) -> tuple[int, np.dtype[Any], str]:
    """Return dimension, number type and name of the column of rows of a `pyarrow.Schema`.

    `column` is its `name` or `name:dtype`, or None for `embedding`. `batches(name)` yields a column
    of the table; the first row of lists with numbers says their dimension, which is 0 without one.
    """
    name, _, stated = (column or DEFAULT).rpartition(":")
    if stated not in FLOATS:
        name, stated = column or DEFAULT, ""
    place = f"{path}: column {name!r}"
    if schema.names.count(name) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "no column"
        number = "no column" if name not in schema.names else "two columns"
        raise ValueError(f"{path}: has {number} {name!r}; choose one as the column, of: {columns}")
    field, types = schema.field(name), pyarrow().types
    storage, is_fixed = _storage(field.type), types.is_fixed_size_list(_storage(field.type))
    if types.is_fixed_size_binary(storage):
        stated = stated or (field.metadata or {}).get(b"dtype", b"").decode(errors="replace")
        if stated not in FLOATS or storage.byte_width % np.dtype(stated).itemsize:
            expected = f"expected its number type and a multiple of its bytes, as in {name}:float16"
            raise TypeError(f"{place} is {field.type} of {stated or 'no type'}; {expected}")
        return storage.byte_width // np.dtype(stated).itemsize, np.dtype(stated), name
    is_list = is_fixed or types.is_list(storage) or types.is_large_list(storage)
    if not (is_list and types.is_floating(storage.value_type)):
        expected = "expected a list or fixed-size list of half, float or double, or a binary column"
        raise TypeError(f"{place} is {field.type}, {expected}; cast or flatten it")
    if any(size not in (1, None) for size in _tensor_shape(field)[:-1]):
        expected = "expected vectors [D] or [1, D]; reshape them"
        raise TypeError(f"{place} holds tensors {_tensor_shape(field)}, {expected}")
    dtype = np.dtype(storage.value_type.to_pandas_dtype())
    if stated and dtype != stated:
        raise TypeError(f"{place} holds {dtype}, asked for was {stated}; leave {stated} out")
    if is_fixed:
        dimension = storage.list_size
    else:
        arrays = (batch.column(name) for batch in batches(name))
        lengths = chain.from_iterable(_lists_of(part, dtype)[1] for part in arrays)
        dimension = int(next((length for length in lengths if length > 0), 0))
    if not is_fixed <= dimension < MAX_COLUMNS:
        raise ValueError(f"{place} has {dimension} numbers a row, expected 1 or more")
    return dimension, dtype, name


def _storage(column_type: Any) -> Any:
    """Return the type that an extension type is stored as; any other type is returned as it is."""
    is_extension = isinstance(column_type, pyarrow().BaseExtensionType)
    return column_type.storage_type if is_extension else column_type


def _tensor_shape(field: Any) -> list[Any]:
    """Return the shape of each row of a tensor type; empty if the field names none."""
    if (shape := getattr(field.type, "shape", None)) is not None:
        return list(shape)
    with suppress(ValueError, RecursionError):  # its library was not imported here
        shape = json.loads((field.metadata or {}).get(b"ARROW:extension:metadata", b""))
        shape = shape.get("shape") if isinstance(shape, dict) else shape
        return shape if isinstance(shape, list) else []
    return []


def rows_of(array: Any, shard: Shard, first: int) -> np.ndarray:
    """Return rows `[n, D]` of a `pyarrow.Array`; they view its memory where every row is whole.

    A ValueError names a row of another length; `first` is the number of the first one.
    """
    lists, lengths = _lists_of(array, shard.dtype)
    # Numbers are copied only where some are null. Those of a list that is null are left out.
    numbers: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False)
    is_whole = lengths == shard.dimension
    if is_whole.all():
        return numbers.reshape(-1, shard.dimension)
    if (ragged := np.flatnonzero(~is_whole & (lengths > 0))).size:
        row = int(ragged[0])
        raise ValueError(
            f"{shard.path}: row {first + row} of column {shard.column!r} has {lengths[row]} "
            f"numbers, expected {shard.dimension} numbers as in the first row; mend it, or make it "
            "null, a bad row"
        )
    rows = np.full((len(lengths), shard.dimension), np.nan, shard.dtype)
    rows[is_whole] = numbers.reshape(-1, shard.dimension)
    return rows


def _lists_of(array: Any, dtype: np.dtype[Any]) -> tuple[Any, np.ndarray]:
    """Return rows as lists of numbers that may be followed, and their lengths; -1 for null."""
    array.validate(full=True)  # its offsets and buffers have not been read yet, and may not fit
    lists, pa = getattr(array, "storage", array), pyarrow()
    if pa.types.is_fixed_size_binary(lists.type):
        width, number = lists.type.byte_width // dtype.itemsize, pa.from_numpy_dtype(dtype)
        buffers, count = [None, lists.buffers()[1]], len(lists) * width
        values = pa.Array.from_buffers(number, count, buffers, offset=lists.offset * width)
        mask = lists.is_null() if lists.null_count else None
        lists = pa.FixedSizeListArray.from_arrays(values, width, mask=mask)
    return lists, pa.compute.list_value_length(lists).fill_null(-1).to_numpy()


def array_of(rows: np.ndarray, column_type: Any) -> Any:
    """Return rows `[n, D]` as a `pyarrow.Array` of a list or binary type; the memory is shared."""
    pa, storage, data = pyarrow(), _storage(column_type), pyarrow().py_buffer(rows.reshape(-1))
    if pa.types.is_fixed_size_binary(storage):
        return pa.Array.from_buffers(storage, len(rows), [None, data])
    if rows.size > np.iinfo(np.int32).max:  # a cast would let the offsets wrap
        raise ValueError(f"got {rows.size} numbers for one array; write fewer rows at a time")
    values = pa.Array.from_buffers(pa.from_numpy_dtype(rows.dtype), rows.size, [None, data])
    array = pa.FixedSizeListArray.from_arrays(values, rows.shape[1]).cast(storage)
    is_extension = storage is not column_type
    return pa.ExtensionArray.from_storage(column_type, array) if is_extension else array


@dataclass(frozen=True)
class TableShard(Shard):
    """One column of a table."""

    schema: Any = field(repr=False, compare=False)  # the `pyarrow.Schema` of the file

    @property
    def has_other_columns(self) -> bool:
        """True if the table has other columns than the rows."""
        return len(self.schema) > 1

    @abstractmethod
    def record_batches(self, names: list[str], first: int = 0) -> Iterator[Any]:
        """Yield the columns of these names from row `first` on, as record batches of any size."""

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield the rows of each record batch; see `Shard.pieces`."""
        for batch in self.record_batches([self.column], first):
            with decoded(self.path):
                rows = rows_of(batch.column(self.column), self, first)
            yield rows
            first += len(batch)

    def other_batches(self, only: Collection[str] = ()) -> Iterator[Any]:
        """Yield the columns other than the rows as record batches; see `Shard.other_columns`."""
        names = [name for name in self.schema.names if name != self.column]
        for batch in self.record_batches(selected(names, only)):
            with decoded(self.path):
                batch.validate(full=True)  # so that no damage is copied
            yield batch

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the columns other than the rows; see `Shard.other_columns`."""
        for batch in self.other_batches(only):
            yield from batch.to_pylist()


class TableColumns(NamedTuple):
    """The columns of a table that is written; a `TableShard` has them too."""

    schema: Any  # a `pyarrow.Schema` of all of them
    column: str = DEFAULT  # name of the rows
    # Yields the other columns as record batches of any size, as many rows in all.
    other_batches: Callable[[], Iterator[Any]] = lambda: iter(())


class TableWriter(FormatWriter):
    """Write a table; each batch of rows becomes one record batch or row group.

    Its `source` is a `TableShard` or `TableColumns`. A format implements `_open_table`.
    """

    def _open_table(self, file: Any) -> Any:
        """Return pyarrow's writer of `self.columns.schema` to a file."""
        raise NotImplementedError

    def _begin(self) -> None:
        self.columns = self._source or TableColumns(plain_schema(self.dimension, self.dtype))
        has_others = len(self.columns.schema) > 1
        self._batches = self.columns.other_batches() if has_others else None
        self._unwritten: Any = None  # rows of the other columns, a `pyarrow.Table`
        self._table = self._open_table(pyarrow().PythonFile(self._buffered, "w"))

    def _append(self, rows: np.ndarray) -> None:
        schema, name = self.columns.schema, self.columns.column
        columns = self._next_columns(self._batches, len(rows)) if self._batches else []
        columns.insert(schema.get_field_index(name), array_of(rows, schema.field(name).type))
        self._table.write_table(pyarrow().Table.from_arrays(columns, schema=schema))

    def _next_columns(self, batches: Iterator[Any], count: int) -> list[Any]:
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
