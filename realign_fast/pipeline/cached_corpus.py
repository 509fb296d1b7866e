"""A corpus whose rows are read from disk once and kept in memory between passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..corpus.corpus import Batch, Corpus
from ..corpus.shard import Shard


class CachedCorpus(Corpus):
    """A :class:`Corpus` that keeps the rows of a shard in memory once it was read to its end.

    Batches are cut where those of the corpus are, so results have the same bytes.
    """

    def __init__(self, corpus: Corpus) -> None:
        vars(self).update(vars(corpus))  # opened already: no header is read again
        self._rows: dict[int, torch.Tensor] = {}
        self.rows_from_memory = 0  # in all passes until now

    def batches(
        self,
        shard: Shard | int | None = None,
        *,
        batch_rows: int | None = None,
        batch_bytes: int = 4 << 20,
        start: int = 0,
        ring: Any = None,
    ) -> Iterator[Batch]:
        """Return the batches of :meth:`Corpus.batches`; cached shards come from memory."""
        if isinstance(shard, int) and shard in self._rows and not start:
            size = batch_rows or max(1, batch_bytes // self.shards[shard].row_bytes)
            return self._cached(shard, size)
        options: dict[str, Any] = {"batch_bytes": batch_bytes, "start": start, "ring": ring}
        batches = super().batches(shard, batch_rows=batch_rows, **options)
        return self._caching(shard, batches) if isinstance(shard, int) and not start else batches

    def _cached(self, index: int, size: int) -> Iterator[Batch]:
        for first in range(0, self.shards[index].num_rows, size):
            rows = self._rows[index][first : first + size]
            yield Batch(index, first, rows)
            self.rows_from_memory += len(rows)

    def _caching(self, index: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        rows = torch.empty(self.shards[index].num_rows, self.dimension, dtype=self.dtype)
        for batch in batches:
            rows[batch.first : batch.first + len(batch.rows)] = batch.rows
            yield batch
        self._rows[index] = rows
