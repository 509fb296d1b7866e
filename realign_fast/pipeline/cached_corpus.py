"""A corpus whose rows are read from disk once and kept in memory between passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..corpus.corpus import Batch, Corpus


class CachedCorpus(Corpus):
    """A :class:`Corpus` that keeps the rows of a shard in memory once it was read to its end.

    Batches are cut where those of the corpus are, so results have the same bytes.
    """

    def __init__(self, corpus: Corpus) -> None:
        vars(self).update(vars(corpus))  # opened already: no header is read again
        self._rows: dict[int, torch.Tensor] = {}
        self.rows_from_memory = 0  # in all passes until now

    def batches(self, shard: Any = None, **options: Any) -> Iterator[Batch]:
        """Yield the batches of :meth:`Corpus.batches`; a whole cached shard comes from memory."""
        size: int = options.get("batch_rows") or 0
        if not isinstance(shard, int) or not size or options.get("start"):  # no whole shard
            yield from super().batches(shard, **options)
        elif shard in self._rows:
            for first in range(0, self.shards[shard].num_rows, size):
                rows = self._rows[shard][first : first + size]
                yield Batch(shard, first, rows)
                self.rows_from_memory += len(rows)
        else:
            rows = torch.empty(self.shards[shard].num_rows, self.dimension, dtype=self.dtype)
            for batch in super().batches(shard, **options):
                rows[batch.first : batch.first + len(batch.rows)] = batch.rows
                yield batch
            self._rows[shard] = rows
