"""Batches of rows from any object that holds rows: a tensor, an array, a corpus, a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from .._argument_checks import expect_counts, expect_tensor
from .._argument_checks import tensor_of as array_tensor
from .corpus import Corpus, common_encoder
from .formats.arrow import is_table
from .formats.arrow_columns import DEFAULT

# Also tables and datasets (`Corpus`), which have no type in common.
Rows: TypeAlias = Tensor | np.ndarray[Any, Any] | Corpus | str | os.PathLike[str] | Iterable[Any]


class RowBatch(NamedTuple):
    """Rows [n, D], and how an error names them: a file, and the number of the first row."""

    origin: str
    first_row: int
    rows: Tensor


def batches(rows: Rows, name: str, batch_rows: int) -> Iterator[RowBatch]:
    """Iterate over rows [N, D], ``batch_rows`` at a time of a tensor or an array.

    A table of pandas or polars stands for its numbers. ``name`` is for errors about rows that have
    no file. An object that holds no floating-point rows, or an iterator, which can be read only
    once, is a TypeError.
    """
    expect_counts(name, batch_rows=batch_rows)
    rows = opened(rows, name)
    if isinstance(rows, Corpus):
        for batch in rows.batches():
            yield RowBatch(str(rows.shards[batch.shard].path), batch.first, batch.rows)
        return
    if isinstance(rows, (Tensor, np.ndarray)):
        if isinstance(rows, Tensor):
            expect_tensor(name, rows)
        if rows.ndim != 2:
            raise ValueError(f"{name}: expected rows [N, D], got shape {list(rows.shape)}")
        matrix: Any = rows
        rows = (matrix[first : first + batch_rows] for first in range(0, len(rows), batch_rows))
    elif not isinstance(rows, Iterable) or isinstance(rows, (bytes, Mapping)):
        actual = type(rows).__name__
        raise TypeError(f"{name}: expected rows [N, D], a corpus or batches of rows, got {actual}")
    elif iter(rows) is rows:
        raise TypeError(f"{name}: an iterator can be read only once; give a list or a DataLoader")
    first_row = 0
    for item in rows:
        if isinstance(item, (list, tuple)) and len(item) == 1:  # of a TensorDataset
            (item,) = item
        batch_of_rows = array_tensor(name, item)
        if batch_of_rows.dim() < 2:
            shape = list(batch_of_rows.shape)
            raise ValueError(
                f"{name}: expected batches of rows [n, D], got shape {shape}; stack single rows, "
                "for example with numpy.stack(rows)"
            )
        yield RowBatch(name, first_row, batch_of_rows)
        first_row += len(item)


def opened(rows: Any, name: str = "rows") -> Any:
    """Return the corpus at a path or of a table with vectors; any other object as it is.

    A table without a column `embedding`, whose columns are the numbers, is an array.
    """
    parts = rows if isinstance(rows, (list, tuple)) and rows else [rows]
    if all(isinstance(part, (str, os.PathLike)) for part in parts):
        return Corpus(rows)
    if not hasattr(rows, "to_numpy"):
        return Corpus(rows) if is_table(rows) else rows
    dtype = str(getattr(rows, "dtype", getattr(rows, "type", ""))).lower()  # of a column alone
    has_vectors = dtype.startswith(("object", "list", "array", "fixed_size", "large_list"))
    if is_table(rows) and (has_vectors or DEFAULT in getattr(rows, "columns", ())):
        return Corpus(rows)
    return _table_values(rows, name)


def opened_sides(**sides: Any) -> dict[str, Any]:
    """Return each side as `opened` does; frames with the same columns get the order of the first.

    Columns are matched by name, so that the order in which a frame was built does not matter.
    """
    first: list[Any] | None = None
    for name, side in sides.items():
        columns = (
            list(side.columns) if hasattr(side, "to_numpy") and hasattr(side, "columns") else None
        )
        if first is None:
            first = columns
        elif columns and columns != first and sorted(map(str, columns)) == sorted(map(str, first)):
            sides[name] = side[first]
    return {name: opened(side, name) for name, side in sides.items()}


def tensor_of(name: str, rows: object, argument: str = "rows") -> Tensor:
    """Return the rows of a tensor, an array, a table or a dataset as one tensor [N, D].

    A corpus is read whole. Errors are those of `_argument_checks.tensor_of` and of `Corpus`.
    """
    if is_table(rows) or hasattr(rows, "to_numpy"):
        rows = opened(rows, name)
    return rows[:] if isinstance(rows, Corpus) else array_tensor(name, rows, argument)


def encoder_of(*sides: object) -> str | None:
    """Return the encoder of all corpora among the sides; a ValueError for two that differ."""
    return common_encoder(
        *((rows.path, rows.encoder) for rows in sides if isinstance(rows, Corpus))
    )


def _table_values(table: Any, name: str) -> np.ndarray[Any, Any]:
    """Return the values [N, D] of a table; a TypeError names a column that holds other values.

    An id column of whole numbers must not become a part of the rows.
    """
    columns = list(getattr(table, "columns", ()))  # none of a Series
    for column, dtype in zip(columns, table.dtypes, strict=True) if columns else ():
        if not str(dtype).lower().startswith(("float", "double")):
            raise TypeError(
                f"{name}: column {column!r} of the table holds {dtype}, expected floating-point "
                f"numbers; select those of the embedding, or name a column of vectors {DEFAULT!r}"
            )
    try:
        values: np.ndarray[Any, Any] = table.to_numpy()
    except (ValueError, NotImplementedError) as error:  # lists in an array of pyarrow
        advice = "give its numbers, such as rows.flatten().to_numpy().reshape(len(rows), -1)"
        fault = f"expected rows [N, D], got {type(table).__name__} ({error})"
        raise TypeError(f"{name}: {fault}; {advice}") from error
    if values.ndim == 1:
        raise TypeError(
            f"{name}: expected rows [N, D], got one column of {len(values)} numbers in a "
            f"{type(table).__name__}; give a frame of all columns, or a column of vectors"
        )
    if columns and values.dtype == object:  # nullable dtypes of pandas; a missing value is NaN
        values = table.to_numpy(np.float64, na_value=np.nan)
    return values
