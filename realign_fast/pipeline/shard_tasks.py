"""What is done to one shard: it is measured, or it is aligned. An engine maps these over shards.

Each work knows its pass, takes the number of a shard, and looks in the checkpoints first: a shard
that is finished and unchanged is not read again. It can be pickled, for engines of other processes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from ..corpus.corpus import Batch, Corpus, Shard, ShardWriter
from ..moments import Moments, RowMap, good_rows
from ..storage.local import LocalPath
from ..storage.paths import StoragePath
from .checkpoints import Checkpoints, Entry, check_unchanged, checksum
from .device_streams import Lanes, Outlet, Sent, batches_on, lanes_of
from .settings import BATCH_BYTES


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard."""

    shard: int  # its number in the corpus
    moments: Moments | None  # None: not finished, and nobody was to read it
    rows: int  # read now: 0 where it was finished before
    entry: Entry  # for the manifest


def in_turn(work: AlignWork, shards: Sequence[int]) -> Iterator[ShardResult]:
    """``map``, but a shard is synced while the next is computed.

    A shard that was written is put in its place whatever becomes of the others: leaving the pool
    waits for it.
    """
    with ThreadPoolExecutor(1, "realign-fast-sync") as disk:
        ends: deque[Future[ShardResult]] = deque()
        for shard in shards:
            ends.append(disk.submit(work.begin(shard)))
            if len(ends) == 2:
                yield ends.popleft().result()
        while ends:
            yield ends.popleft().result()


def _silent(rows: int) -> None:
    """For works in other processes: their progress is seen shard by shard."""


@dataclass(frozen=True)
class ShardWork:
    """One pass over a corpus, shard by shard.

    ``identities`` are those of the shards when the run began; a shard that differs from its own
    after it was read is refused. Without ``checkpoints`` nothing is kept. ``reading=False`` takes
    only what is finished.
    """

    name: str
    corpus: Corpus
    identities: tuple[Entry, ...]
    checkpoints: Checkpoints | None
    bad_rows: str = "error"
    batch_bytes: int = BATCH_BYTES
    covariance: bool = False
    aligner: torch.nn.Module | None = None
    reading: bool = True
    device: str = "cpu"
    advance: Callable[[int], None] = _silent

    def __call__(self, index: int) -> ShardResult:
        """Measure shard ``index``: of its rows, or of those sent through the aligner."""
        shard, known = self.corpus.shards[index], self.identities[index]
        if self.checkpoints and (found := self.checkpoints.load(shard, known)):
            return ShardResult(index, found[0], 0, found[1])
        if not self.reading:
            return ShardResult(index, None, 0, {})
        moments = Moments(self.covariance, accurate=self.covariance)
        lanes = lanes_of(self.device)
        aligner = self._aligner_on(lanes)
        through = aligner.row_map if aligner is not None else None
        for batch in batches_on(lanes, self.corpus, index, self._batch_rows(shard)):
            self._update(moments, shard, batch, through)
            self.advance(len(batch.rows))
        moments = moments.to("cpu")
        check_unchanged(shard, known)
        entry = self.checkpoints.save(shard, known, moments) if self.checkpoints else {}
        return ShardResult(index, moments, shard.num_rows, entry)

    def _batch_rows(self, shard: Shard) -> int:
        return max(1, self.batch_bytes // shard.row_bytes)

    def _aligner_on(self, lanes: Lanes | None) -> torch.nn.Module | None:
        if self.aligner is None or lanes is None:
            return self.aligner
        return copy.deepcopy(self.aligner).to(lanes.device)

    def _update(self, moments: Moments, shard: Shard, batch: Batch, through: RowMap | None) -> bool:
        """Add a batch to moments; says whether a bad row was in it."""
        bad = moments.zero_rows + moments.nonfinite_rows
        options = {"bad_rows": self.bad_rows, "where": str(shard.path), "first_row": batch.first}
        moments.update(batch.rows, through=through, **options)
        return moments.zero_rows + moments.nonfinite_rows > bad


@dataclass(frozen=True)
class AlignWork(ShardWork):
    """Shards sent through the aligner into ``folder``, under their own names."""

    folder: StoragePath = field(default_factory=LocalPath)

    def __call__(self, index: int) -> ShardResult:
        """Align shard ``index``; the moments are those of its result before it is rounded."""
        return self.begin(index)()

    def begin(self, index: int) -> Callable[[], ShardResult]:
        """Align shard ``index`` and write it; what is returned syncs it and puts it in its place.

        It has to be called, once, by any thread.
        """
        shard, known = self.corpus.shards[index], self.identities[index]
        made = self.folder / shard.path.name
        if found := self.checkpoints.load_aligned(shard, known, made):
            return lambda: ShardResult(index, found[0], 0, found[1])
        if not self.reading:
            return lambda: ShardResult(index, None, 0, {})
        self.checkpoints.begin_aligned(shard)
        with ExitStack() as stack:
            writer = stack.enter_context(self.corpus.writer(shard, made))
            moments, total = self._write(index, shard, writer)
            check_unchanged(shard, known)
            writing = stack.pop_all()

        def end() -> ShardResult:
            writing.close()
            facts = {"name": made.name, "checksum": total, **self._expected(moments)}
            entry = self.checkpoints.save_aligned(shard, known, made, moments, facts)
            return ShardResult(index, moments, shard.num_rows, entry)

        return end

    def _write(self, index: int, shard: Shard, writer: ShardWriter) -> tuple[Moments, int]:
        """Align into a writer; while a batch is computed, the ones before it are written.

        Leaving the pool waits for its thread, so no write is in flight when this returns or raises.
        """
        moments, total, lanes = Moments(), 0, lanes_of(self.device)
        size = max(1, min(self._batch_rows(shard), shard.num_rows))
        outlet = Outlet(lanes, size, shard.dimension, self.corpus.dtype)
        writing: deque[Future[None]] = deque()

        def write(sent: Sent) -> None:
            nonlocal total
            rows = outlet.rows_of(sent)
            writer.write(rows)
            total = checksum(rows, total)

        aligner = self._aligner_on(lanes)
        through = aligner.row_map
        with ThreadPoolExecutor(1, "realign-fast-writer") as disk:
            for batch in batches_on(lanes, self.corpus, index, size):
                if len(writing) == outlet.slots:
                    writing.popleft().result()
                rows, result = batch.rows, outlet.next(len(batch.rows))
                # The moments of the result come from the rows in the same visit to memory.
                bad = self._update(moments, shard, batch, through)
                aligner(rows, out=result)
                if bad and self.bad_rows == "skip":
                    result[~good_rows(rows)] = 0
                writing.append(disk.submit(write, outlet.send(len(rows))))
                self.advance(len(rows))
            while writing:
                writing.popleft().result()
            return moments.to("cpu"), total

    def _expected(self, moments: Moments) -> Entry:
        """How many rows of the result are zero and how many NaN."""
        zero, nonfinite = moments.zero_rows, moments.nonfinite_rows
        skip = self.bad_rows == "skip"
        return {"zero_rows": (zero + nonfinite) * skip, "nan_rows": nonfinite * (not skip)}
