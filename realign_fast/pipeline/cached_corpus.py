"""A corpus that is read from disk once and kept in memory between passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..corpus.corpus import Batch, Corpus


class CachedCorpus:
    """A :class:`Corpus` whose shards stay in memory once they were read to their end.

    Batches are cut where those of the corpus are, so results have the same bytes.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._rows: dict[int, torch.Tensor] = {}
        self.rows_from_memory = 0  # in all passes until now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._corpus, name)

    def __len__(self) -> int:
        return len(self._corpus)

    def batches(
        self,
        index: int,
        *,
        batch_rows: int | None = None,
        batch_bytes: int = 4 << 20,
        ring: Any = None,
    ) -> Iterator[Batch]:
        """The batches of shard ``index``, as :meth:`Corpus.batches` gives them."""
        shard = self._corpus.shards[index]
        size = batch_rows or max(1, batch_bytes // shard.row_bytes)
        if index in self._rows:
            for first in range(0, shard.num_rows, size):
                rows = self._rows[index][first : first + size]
                yield Batch(index, first, rows)
                self.rows_from_memory += len(rows)
            return
        rows = torch.empty(shard.num_rows, shard.dimension, dtype=self._corpus.dtype)
        for batch in self._corpus.batches(index, batch_rows=size, ring=ring):
            rows[batch.first : batch.first + len(batch.rows)] = batch.rows
            yield batch
        self._rows[index] = rows
