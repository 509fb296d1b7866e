"""Columns of vectors in Arrow's terms: their choice, their values as numpy rows, and back.

A column of rows is a list, large list or fixed-size list of half, float or double; or a fixed-size
binary whose number type stands in the metadata of its field (`dtype`) or in the name that asks for
it (`embedding:float16`). This is the one file that imports pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..._extras import import_extra
from ...storage.paths import AnyPath, StoragePath
from ..shard import MAX_COLUMNS

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


class VectorColumn(NamedTuple):
    """A column that holds rows."""

    name: str
    dtype: np.dtype[Any]
    dimension: int  # 0: a column of lists, whose first row says it


def vectors_of(path: StoragePath, schema: Any, column: str | None) -> VectorColumn:
    """Return the column of rows of a `pyarrow.Schema`: `name` or `name:dtype`, or `embedding`.

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
        return _binary_column(place, name, column_type, stated)
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
    dimension = _checked_dimension(place, column_type.list_size) if is_fixed else 0
    return VectorColumn(name, dtype, dimension)


def _binary_column(place: str, name: str, column_type: Any, stated: str) -> VectorColumn:
    if stated not in FLOATS:
        advice = f"ask for column {name + ':float16'!r} (or float32, float64)"
        raise TypeError(f"{place} is {column_type}, which does not say its number type; {advice}")
    dtype = np.dtype(stated)
    if column_type.byte_width % dtype.itemsize:
        expected = f"expected a multiple of {dtype.itemsize} for {stated}"
        raise TypeError(f"{place} is {column_type}, {expected}; ask for another number type")
    dimension = _checked_dimension(place, column_type.byte_width // dtype.itemsize)
    return VectorColumn(name, dtype, dimension)


def _checked_dimension(place: str, dimension: int) -> int:
    if not 0 < dimension < MAX_COLUMNS:
        raise ValueError(f"{place} has {dimension} numbers a row, expected 1 or more")
    return dimension


def first_dimension(path: StoragePath, column: str, arrays: Iterator[Any]) -> int:
    """Return the length of the first row of a column of lists, given as `arrays`."""
    array = next((array for array in arrays if len(array)), None)
    place = f"{path}: column {column!r}"
    if array is not None:
        array.validate()  # or a damaged offset would be followed
    if array is None or not array[0].is_valid:
        problem = "has no rows" if array is None else "is null in row 0"
        advice = "leave it out or write it"
        raise ValueError(f"{place} {problem}, so nothing says its dimension; {advice}")
    return _checked_dimension(place, len(array[0]))


def rows_of(array: Any, vectors: VectorColumn, path: StoragePath, first: int) -> np.ndarray:
    """Return rows `[n, D]` that view the memory of a `pyarrow.Array`, which begins at row `first`.

    Nulls and rows of another length are a `ValueError`.
    """
    place = f"{path}: column {vectors.name!r}"
    array.validate()  # offsets and buffers have not been read yet, and may not fit
    if array.null_count:
        row = first + array.is_null().to_numpy(zero_copy_only=False).argmax()
        raise ValueError(f"{place}: row {row} is null, expected numbers; fill it or drop the row")
    count = len(array) * vectors.dimension
    if pyarrow().types.is_fixed_size_binary(array.type):
        start, data = array.offset * vectors.dimension, array.buffers()[1]
    else:
        if not pyarrow().types.is_fixed_size_list(array.type):
            _check_lengths(array, vectors.dimension, place, first)
        values = array.flatten()
        if values.null_count:
            null = values.is_null().to_numpy(zero_copy_only=False).argmax()
            row = first + null // vectors.dimension
            raise ValueError(f"{place}: row {row} has a null in it; fill it or drop the row")
        start, data = values.offset, values.buffers()[1]
    if not count:
        return np.empty((0, vectors.dimension), vectors.dtype)
    flat = np.frombuffer(data, vectors.dtype, count, start * vectors.dtype.itemsize)
    return flat.reshape(-1, vectors.dimension)


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
