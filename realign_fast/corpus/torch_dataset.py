"""The rows of a corpus for torch's DataLoader, split over its workers and the ranks of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

if TYPE_CHECKING:
    from .corpus import Corpus


class CorpusDataset(IterableDataset[Any]):
    """An iterable over the rows of a corpus, in which every rank and worker reads its own part.

    All parts together hold each row exactly once, in the order of the corpus. Their sizes differ
    by one row at most; a job whose ranks must take equally many steps has to stop at the shortest.

    >>> loader = DataLoader(corpus.to_torch(batch_rows=4096), batch_size=None, num_workers=2)

    Args:
        corpus: the rows; it is pickled for worker processes, which open the files themselves.
        batch_rows: yield `[n, D]` with up to so many rows, for `DataLoader(batch_size=None)`; None
            yields rows `[D]`.
        with_ids: yield `(rows, ids)`; ids are text.
        rank, world_size: of this process; by default those of `torch.distributed`, or of the
            variables RANK and WORLD_SIZE that torchrun sets.
    Raises:
        ValueError: `rank` is none of `world_size`, or one is given or set alone.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_rows: int | None = None,
        with_ids: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError("to_torch: give both rank and world_size, or neither")
        if rank is None or world_size is None:
            rank, world_size = _rank_and_world_size()
        if not 0 <= rank < world_size:
            raise ValueError(f"to_torch: rank {rank} is none of 0..{world_size - 1}")
        if batch_rows is not None and batch_rows < 1:
            raise ValueError(f"to_torch: batch_rows is {batch_rows}, expected 1 or more")
        self.corpus, self.batch_rows, self.with_ids = corpus, batch_rows, with_ids
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Any]:
        worker, corpus = get_worker_info(), self.corpus
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part, parts = self.rank * workers + number, self.world_size * workers
        first, end = (corpus.num_rows * place // parts for place in (part, part + 1))
        options: dict[str, Any] = {"batch_rows": self.batch_rows, "with_ids": self.with_ids}
        for batch in corpus.batches(None, start=first, **options) if first < end else ():
            row = int(corpus.starts[batch.shard]) + batch.first
            rows, ids = batch.rows[: end - row], (batch.ids or [])[: end - row]
            if self.batch_rows is not None:
                yield (rows, ids) if self.with_ids else rows
            else:
                yield from zip(rows, ids, strict=True) if self.with_ids else rows
            if row + len(batch.rows) >= end:
                return


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if found["RANK"] is None and found["WORLD_SIZE"] in (None, "1"):
        if found["WORLD_SIZE"] or "LOCAL_RANK" not in os.environ:
            return 0, 1
    if not all((text or "").isdecimal() for text in found.values()):
        raise ValueError(
            f"to_torch: the environment has RANK {found['RANK']!r} and WORLD_SIZE "
            f"{found['WORLD_SIZE']!r}, expected a whole number in both, as torchrun sets them, or "
            "none of RANK, WORLD_SIZE and LOCAL_RANK; or give rank and world_size"
        )
    return int(found["RANK"] or 0), int(found["WORLD_SIZE"] or 1)
