"""Batches of rows from whatever holds them: a tensor, an array, a corpus, a list of batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus

Rows = Tensor | np.ndarray | Corpus | str | os.PathLike[str] | Iterable[Tensor]


def batches(rows: Rows, name: str, batch_rows: int) -> Iterator[tuple[str, int, Tensor]]:
    """``(where, first row, rows [n, D])`` from whatever holds rows."""
    if isinstance(rows, (str, os.PathLike)):
        rows = Corpus(rows)
    if isinstance(rows, Corpus):
        for batch in rows.batches():
            yield str(rows.shards[batch.shard].path), batch.first, batch.rows
        return
    if isinstance(rows, (Tensor, np.ndarray)):
        if rows.ndim != 2:
            raise ValueError(f"{name}: expected rows [N, D], got shape {list(rows.shape)}")
        for first_row in range(0, len(rows), batch_rows):
            yield name, first_row, _as_tensor(rows[first_row : first_row + batch_rows], name)
        return
    if not isinstance(rows, Iterable):
        got = type(rows).__name__
        raise TypeError(f"{name}: expected rows [N, D], a corpus or batches of rows, got {got}")
    if iter(rows) is rows:
        raise TypeError(f"{name}: an iterator can be read only once; give a list or a DataLoader")
    first_row = 0
    for batch in rows:
        if isinstance(batch, (list, tuple)) and len(batch) == 1:  # of a TensorDataset
            (batch,) = batch
        yield name, first_row, _as_tensor(batch, name)
        first_row += len(batch)


def _as_tensor(rows: Tensor | np.ndarray, name: str) -> Tensor:
    if isinstance(rows, np.ndarray):  # of any byte order and strides
        rows = torch.from_numpy(np.ascontiguousarray(rows, rows.dtype.newbyteorder("=")))
    if not isinstance(rows, Tensor) or rows.dim() < 2:
        got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{name}: expected batches of rows [n, D], got {got}; give tensors")
    return rows
