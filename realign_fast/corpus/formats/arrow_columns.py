"""Columns of vectors in Arrow's terms: which there are, as numpy rows, and back. pyarrow's door.

A column of rows is a list, large list or fixed-size list of half, float or double, or a fixed-size
binary whose number type stands in the metadata of its field (`dtype`) or in the name that asks for
it (`embedding:float16`). Other columns pass through as they are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from ..._extras import import_extra
from ...storage.paths import AnyPath, explained, output_path
from .npy import MAX_COLUMNS, ShardWriter

DEFAULT = "embedding"
FLOATS = ("float16", "float32", "float64")
OTHER_ROWS = 1024  # of other columns read at a time: they may hold images


def pyarrow() -> ModuleType:
    """Import pyarrow with its ``ipc`` and ``parquet`` modules."""
    return import_extra("pyarrow.parquet", "parquet", "Access to parquet and Arrow files")


@contextmanager
def decoded(path: AnyPath, file: Any = None) -> Iterator[None]:
    """What pyarrow says of a file that it cannot read, with the name of the file."""
    try:
        yield
    except (pyarrow().ArrowException, UnicodeDecodeError, OSError) as error:
        # Of a file that fetches, pyarrow may leave the words of an error and lose the error.
        if told := getattr(getattr(file, "raw", None), "error", None):
            raise told from None
        if isinstance(error, OSError) and error.errno:
            raise
        advice = "truncated, damaged or of another format; write it again"
        words = " ".join(str(error).split())  # of pyarrow, which may take several lines
        raise ValueError(f"{path}: cannot be read ({words}): {advice}") from error


class Vectors(NamedTuple):
    """A column that can hold rows."""

    name: str
    dtype: np.dtype
    dimension: int | None  # None: a list, whose first row says it


def vectors_of(path: AnyPath, schema: Any, column: str | None) -> Vectors:
    """The column asked for (`name` or `name:dtype`), else `embedding`."""
    name, _, stated = (column or DEFAULT).rpartition(":")
    if stated not in FLOATS:
        name, stated = column or DEFAULT, ""
    if schema.names.count(name) != 1:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema) or "no column"
        got = "no column" if name not in schema.names else "two columns"
        raise ValueError(f"{path}: has {got} {name!r}; choose one as the column, of: {there}")
    field, types = schema.field(name), pyarrow().types
    kind, where = field.type, f"{path}: column {name!r}"
    if types.is_fixed_size_binary(kind):
        return _binary(where, name, kind, stated or (field.metadata or {}).get(b"dtype", b""))
    fixed = types.is_fixed_size_list(kind)
    if not (fixed or types.is_list(kind) or types.is_large_list(kind)):
        want = "expected a list, fixed-size list or fixed-size binary of numbers"
        raise TypeError(f"{where} is {kind}, {want}; choose another column")
    if not types.is_floating(kind.value_type):
        want = "expected half, float or double; cast the column"
        raise TypeError(f"{where} holds {kind.value_type}, {want}")
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    if stated and dtype != stated:
        raise TypeError(f"{where} holds {dtype}, asked for was {stated}; leave {stated} out")
    return Vectors(name, dtype, _sized(where, kind.list_size) if fixed else None)


def _binary(where: str, name: str, kind: Any, stated: bytes | str) -> Vectors:
    stated = stated.decode(errors="replace") if isinstance(stated, bytes) else stated
    if stated not in FLOATS:
        advice = f"ask for column {name + ':float16'!r} (or float32, float64)"
        raise TypeError(f"{where} is {kind}, which does not say its number type; {advice}")
    dtype = np.dtype(stated)
    if kind.byte_width % dtype.itemsize:
        want = f"expected a multiple of {dtype.itemsize} for {stated}"
        raise TypeError(f"{where} is {kind}, {want}; ask for another number type")
    return Vectors(name, dtype, _sized(where, kind.byte_width // dtype.itemsize))


def _sized(where: str, dimension: int) -> int:
    if not 0 < dimension < MAX_COLUMNS:
        raise ValueError(f"{where} has {dimension} numbers a row, expected 1 or more")
    return dimension


def first_dimension(path: AnyPath, column: str, arrays: Iterator[Any]) -> int:
    """The numbers in the first row of a column of lists."""
    array = next((one for one in arrays if len(one)), None)
    where = f"{path}: column {column!r}"
    if array is not None:
        array.validate()  # or a damaged offset would be followed
    if array is None or not array[0].is_valid:
        got = "has no rows" if array is None else "is null in row 0"
        raise ValueError(f"{where} {got}, so nothing says its dimension; leave it out or write it")
    return _sized(where, len(array[0]))


def rows_of(array: Any, vectors: Vectors, path: AnyPath, first: int) -> np.ndarray:
    """`[n, D]`, a view of the column's memory; `first` is the row it begins at."""
    where = f"{path}: column {vectors.name!r}"
    array.validate()  # that its offsets and buffers fit: nothing has read them yet
    if array.null_count:
        row = first + array.is_null().to_numpy(zero_copy_only=False).argmax()
        raise ValueError(f"{where}: row {row} is null, expected numbers; fill it or drop the row")
    count = len(array) * vectors.dimension
    if pyarrow().types.is_fixed_size_binary(array.type):
        start, data = array.offset * vectors.dimension, array.buffers()[1]
    else:
        if not pyarrow().types.is_fixed_size_list(array.type):
            lengths = np.diff(array.offsets.to_numpy())
            if (wrong := lengths != vectors.dimension).any():
                row = int(wrong.argmax())
                got = f"row {first + row} has {lengths[row]} numbers"
                want = f"expected {vectors.dimension} as in row 0"
                raise ValueError(f"{where}: {got}, {want}; lists must be of one length")
        values = array.flatten()
        if values.null_count:
            null = values.is_null().to_numpy(zero_copy_only=False).argmax()
            row = first + null // vectors.dimension
            raise ValueError(f"{where}: row {row} has a null in it; fill it or drop the row")
        start, data = values.offset, values.buffers()[1]
    if not count:
        return np.empty((0, vectors.dimension), vectors.dtype)
    flat = np.frombuffer(data, vectors.dtype, count, start * vectors.dtype.itemsize)
    return flat.reshape(-1, vectors.dimension)


def array_of(rows: np.ndarray, kind: Any) -> Any:
    """Rows `[n, D]` as an array of type `kind`; their memory is shared."""
    pa = pyarrow()
    data = pa.py_buffer(rows.reshape(-1))
    if pa.types.is_fixed_size_binary(kind):
        return pa.Array.from_buffers(kind, len(rows), [None, data])
    values = pa.Array.from_buffers(kind.value_type, rows.size, [None, data])
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(values, type=kind)
    wide = np.int64 if pa.types.is_large_list(kind) else np.int32
    if rows.size > np.iinfo(wide).max:
        raise ValueError(f"got {rows.size} numbers for one list array; write fewer rows at a time")
    offsets = pa.py_buffer(np.arange(0, rows.size + 1, rows.shape[1], dtype=wide))
    return type(pa.array([], kind)).from_buffers(
        kind, len(rows), [None, offsets], children=[values]
    )


def checked(batch: Any) -> Any:
    """Other columns, looked through: damage, text that is no UTF-8, would be copied on."""
    batch.validate(full=True)
    return batch


class TableWriter(ShardWriter):
    """`ShardWriter` for a format of columns: each written batch is one record batch or row group.

    `schema` is that of the result, `column` the name of its rows; `others` yields the remaining
    columns as record batches of any size, as many rows in all. `_sink(file)` opens the format.
    """

    def __init__(
        self,
        path: AnyPath,
        num_rows: int,
        dimension: int,
        dtype: torch.dtype,
        schema: Any = None,
        column: str = DEFAULT,
        others: Callable[[], Iterator[Any]] | None = None,
    ) -> None:
        super().__init__(path, num_rows, dimension, dtype)
        self.schema, self.column = schema or plain_schema(dimension, dtype), column
        self._others = iter(others()) if others else None
        self._rest: Any = None  # of the record batch of other columns at hand

    def _sink(self, file: Any) -> Any:
        raise NotImplementedError

    def _begin(self) -> None:
        self._buffered = io.BufferedWriter(self._file, 1 << 20)
        self._table = self._sink(pyarrow().PythonFile(self._buffered, "w"))

    def _append(self, rows: np.ndarray) -> None:
        pa, parts, missing = pyarrow(), [], len(rows)
        while missing and self._others:
            if not self._rest:
                self._rest = next(self._others, None)
                if self._rest is None:
                    what = f"the other columns of its source end before row {self.written}"
                    raise ValueError(f"{self.path}: {what}; write that source again")
            parts.append(self._rest.slice(0, missing))
            self._rest = self._rest.slice(len(parts[-1]))
            missing -= len(parts[-1])
        place = self.schema.get_field_index(self.column)
        array = array_of(rows, self.schema.field(place).type)
        columns = pa.Table.from_batches(parts).columns if parts else []
        columns = [*columns[:place], array, *columns[place:]]
        self._table.write_table(pa.Table.from_arrays(columns, schema=self.schema))

    def _finish(self) -> None:
        self._table.close()
        self._buffered.flush()

    def _abandon(self) -> None:
        with suppress(OSError, ValueError, pyarrow().ArrowException):  # the file goes anyway
            self._table.close()


def write_table(path: AnyPath, schema: Any, batches: Iterator[Any]) -> None:
    """A parquet file of record batches that appears whole or not at all."""
    path = output_path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.pending_file() as file:
            _write_batches(file, schema, batches)


def _write_batches(file: BinaryIO, schema: Any, batches: Iterator[Any]) -> None:
    with pyarrow().parquet.ParquetWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def plain_schema(dimension: int, dtype: torch.dtype, others: Any = ()) -> Any:
    """The columns of a result that no file prescribes: `others`, then `embedding`."""
    pa = pyarrow()
    values = pa.from_numpy_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    return pa.schema([*others, pa.field(DEFAULT, pa.list_(values, dimension))])
