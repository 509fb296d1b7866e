"""The base of shards whose rows are decoded rather than mapped, and the memory of their batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..storage.paths import Stamp
from .io_extension import io as _io
from .shard import Shard


@dataclass(frozen=True)
class StreamedShard(Shard):
    """A shard of a format that is read from its start on; a subclass decodes it in `pieces`."""

    dtype: np.dtype[Any]
    column: str  # name of the rows: a column, a key, the ending of a member's name
    stamp: Stamp  # of the file when it was opened

    @abstractmethod
    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield all rows from `first` on, `[n, D]` at a time; `batch_rows` is a good size.

        A writable piece is given away: a batch may be a view of it.
        """

    def read(
        self, first: int, batch_rows: int, ring: Any = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(row number, rows [n, D])` from row `first` on; see `Shard.read`."""
        if self.path.stamp() != self.stamp:
            raise self.changed_error()
        yield from self.rebatched(self._unchanged_pieces(first, batch_rows), first, batch_rows)
        if self.path.is_remote and self.path.stamp() != self.stamp:
            raise self.changed_error()

    def _unchanged_pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield `pieces`; what is wrong with a file that has changed is that it has changed."""
        try:
            yield from self.pieces(first, batch_rows)
        except (OSError, ValueError) as error:
            if self.path.exists() and self.path.stamp() != self.stamp:
                raise self.changed_error() from error
            raise

    def take(self, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Read the rows at sorted `ids` into the bytes `target[places]`."""
        target[places] = self.take_rows(ids).view(np.uint8)

    def take_rows(self, ids: np.ndarray) -> np.ndarray:
        """Read the rows `[len(ids), D]` at sorted `ids`; all between first and last are decoded."""
        taken = np.empty((len(ids), self.dimension), self.dtype)
        batch_rows = max(1, (1 << 20) // self.row_bytes)
        for first, rows in self.read(int(ids[0]), batch_rows):
            low, high = np.searchsorted(ids, [first, first + len(rows)])
            taken[low:high] = rows.numpy()[ids[low:high] - first]
            if high == len(ids):
                break
        if self.path.stamp() != self.stamp:  # `read` was left before its end, where it looks
            raise self.changed_error()
        return taken


class Buffers:
    """Memory for batches of `batch_rows` rows, which is used again once a batch is released."""

    def __init__(self, shard: StreamedShard, batch_rows: int) -> None:
        self.batch_rows, self.dimension, self.dtype = batch_rows, shard.dimension, shard.dtype
        self._bytes = min(batch_rows, shard.num_rows) * shard.row_bytes

    def empty(self, count: int) -> np.ndarray:
        """Return an uninitialized array `[count, D]`."""
        if not _io:
            return np.empty((count, self.dimension), self.dtype)
        values = np.frombuffer(_ring(self._bytes).take(), self.dtype, count * self.dimension)
        return values.reshape(count, self.dimension)


@lru_cache(maxsize=1)  # kept for the next shard and pass: new memory takes as long as copying
def _ring(size: int) -> Any:
    return _io.Ring(2, size)  # one is looked at while the next is filled
