"""Batches of rows from any object that holds rows: a tensor, an array, a corpus, a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus

Rows: TypeAlias = Tensor | np.ndarray[Any, Any] | Corpus | str | os.PathLike[str] | Iterable[Tensor]


class RowBatch(NamedTuple):
    """Rows [n, D], and how an error names them: a file, and the number of the first row."""

    origin: str
    first_row: int
    rows: Tensor


def batches(rows: Rows, name: str, batch_rows: int) -> Iterator[RowBatch]:
    """Iterate over rows [N, D], ``batch_rows`` at a time of a tensor or an array.

    A table of pandas or polars stands for its numbers. ``name`` is for errors about rows that have
    no file. An object that holds no rows, or an iterator, which can be read only once, is a
    TypeError.
    """
    rows = _table_values(rows, name) if hasattr(rows, "to_numpy") else rows
    if isinstance(rows, (str, os.PathLike)):
        rows = Corpus(rows)
    if isinstance(rows, Corpus):
        for batch in rows.batches():
            yield RowBatch(str(rows.shards[batch.shard].path), batch.first, batch.rows)
        return
    if isinstance(rows, (Tensor, np.ndarray)):
        if rows.ndim != 2:
            raise ValueError(f"{name}: expected rows [N, D], got shape {list(rows.shape)}")
        for first_row in range(0, len(rows), batch_rows):
            batch_of_rows = _as_tensor(rows[first_row : first_row + batch_rows], name)
            yield RowBatch(name, first_row, batch_of_rows)
        return
    if not isinstance(rows, Iterable) or isinstance(rows, (bytes, Mapping)):
        actual = type(rows).__name__
        raise TypeError(f"{name}: expected rows [N, D], a corpus or batches of rows, got {actual}")
    if iter(rows) is rows:
        raise TypeError(f"{name}: an iterator can be read only once; give a list or a DataLoader")
    first_row = 0
    for item in rows:
        if isinstance(item, (list, tuple)) and len(item) == 1:  # of a TensorDataset
            (item,) = item
        yield RowBatch(name, first_row, _as_tensor(item, name))
        first_row += len(item)


def _table_values(table: Any, name: str) -> np.ndarray[Any, Any]:
    """Return the values [N, D] of a table; a TypeError if one of its columns holds no numbers."""
    values: np.ndarray[Any, Any] = table.to_numpy()
    if values.dtype.kind not in "fiu":
        raise TypeError(
            f"{name}: expected a table of numbers, got columns of {values.dtype}; select the "
            "columns of the embedding and convert them to float32"
        )
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _as_tensor(rows: object, name: str) -> Tensor:
    """Return rows [n, D] as a tensor; arrays may have any byte order and strides."""
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(np.ascontiguousarray(rows, rows.dtype.newbyteorder("=")))
    if not isinstance(rows, Tensor) or rows.dim() < 2:
        actual = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{name}: expected batches of rows [n, D], got {actual}; give tensors")
    return rows
