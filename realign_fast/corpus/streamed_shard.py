"""Shards whose rows are decoded, not mapped: what their formats have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..storage.paths import StoragePath
from .formats.npy import TORCH_DTYPES, changed
from .io_extension import io as _io


@dataclass(frozen=True)
class StreamedShard:
    """Rows `[rows, dimension]` of one file; a subclass knows how to decode them."""

    path: StoragePath
    num_rows: int
    dimension: int
    dtype: np.dtype
    column: str  # where the rows are: a column, a key, the ending of a member's name
    stamp: tuple[int, int | str]  # of the file when it was opened
    row_bytes = property(lambda self: self.dimension * self.dtype.itemsize)
    others = None  # for `convert`: a function that yields the other columns as record batches

    def pieces(self, first: int, size: int) -> Iterator[np.ndarray]:
        """All rows from `first` on, `[n, D]` at a time; about `size` is a good n.

        A piece that may be written to is given away: a batch may be a view of it.
        """
        raise NotImplementedError

    def read(self, first: int, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows from `first` on as `(row, [n, D])`; cut at multiples of `size`, as mapped ones."""
        if self.path.stamp() != self.stamp:
            raise changed(self)
        begin, filled, batch = first, 0, None
        for piece in self.pieces(first, size):
            while len(piece):
                if begin == self.num_rows:
                    raise changed(self)
                if batch is None:
                    count = min(begin - begin % size + size, self.num_rows) - begin
                    if piece.flags.writeable and len(piece) >= count:
                        yield begin, torch.from_numpy(piece[:count])
                        piece, begin = piece[count:], begin + count
                        continue
                    batch = np.empty((count, self.dimension), self.dtype)
                part = piece[: len(batch) - filled]
                batch[filled : filled + len(part)] = part
                piece, filled = piece[len(part) :], filled + len(part)
                if filled == len(batch):
                    yield begin, torch.from_numpy(batch)
                    begin, filled, batch = begin + filled, 0, None
        if begin != self.num_rows or (self.path.is_remote and self.path.stamp() != self.stamp):
            raise changed(self)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows at sorted `ids`. Everything between the first and the last of them is decoded."""
        out = np.empty((len(ids), self.dimension), self.dtype)
        size = max(1, (1 << 20) // self.row_bytes)
        for first, rows in self.read(int(ids[0]), size):
            low, high = np.searchsorted(ids, [first, first + len(rows)])
            out[low:high] = rows.numpy()[ids[low:high] - first]
            if high == len(ids):
                break
        return out


class Buffers:
    """Memory for batches of `size` rows, used again when a batch is no longer looked at."""

    def __init__(self, shard: StreamedShard, size: int) -> None:
        self.size, self.dimension, self.dtype = size, shard.dimension, shard.dtype
        self._bytes = min(size, shard.num_rows) * shard.row_bytes

    def empty(self, count: int) -> np.ndarray:
        """`[count, D]`"""
        values = np.frombuffer(_ring(self._bytes).take(), self.dtype, count * self.dimension)
        return values.reshape(count, self.dimension)


@lru_cache(maxsize=1)  # kept for the next shard and pass: new memory takes as long as copying
def _ring(size: int) -> Any:
    return _io.Ring(2, size)  # one is looked at while the next is filled


def torch_dtype(shard: StreamedShard) -> torch.dtype:
    return TORCH_DTYPES[shard.dtype]
