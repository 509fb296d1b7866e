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

Rows: TypeAlias = Tensor | np.ndarray[Any, Any] | Corpus | str | os.PathLike[str] | Iterable[Any]


class RowBatch(NamedTuple):
    """Rows [n, D], and how an error names them: a file, and the number of the first row."""

    origin: str
    first_row: int
    rows: Tensor


def batches(rows: Rows, name: str, batch_rows: int) -> Iterator[RowBatch]:
    """Iterate over rows [N, D], ``batch_rows`` at a time of a tensor or an array.

    ``name`` is for errors about rows that have no file. An object that holds no floating-point
    rows, or an iterator, which can be read only once, is a TypeError.
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


def opened(rows: Any, name: str) -> Any:
    """Return the corpus at a path; any other object as it is.

    A table is a TypeError that begins with `name`: nothing says which columns are the numbers.
    """
    if isinstance(rows, (str, os.PathLike)):
        return Corpus(rows)
    if hasattr(rows, "to_numpy") or hasattr(rows, "__arrow_c_stream__"):
        expect_tensor(name, rows)
    return rows


def tensor_of(name: str, rows: object, argument: str = "rows") -> Tensor:
    """Return the rows of a tensor, an array or a corpus, which is read whole, as [N, D]."""
    return rows[:] if isinstance(rows, Corpus) else array_tensor(name, rows, argument)


def encoder_of(*sides: object) -> str | None:
    """Return the encoder of all corpora among the sides; a ValueError for two that differ."""
    return common_encoder(
        *((rows.path, rows.encoder) for rows in sides if isinstance(rows, Corpus))
    )
