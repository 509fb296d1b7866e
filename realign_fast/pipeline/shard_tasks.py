"""The tasks of a pass: measure one shard, or align it. An engine maps a task over the shards.

A task is called with the index of a shard. It looks for the checkpoint of the shard first: a shard
that is finished and unchanged is not read again. Tasks can be pickled, for engines that run them in
other processes.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from ..align import ReAlign
from ..corpus.convert import table_writer
from ..corpus.corpus import Batch, Corpus
from ..corpus.shard import Shard
from ..corpus.shard_writer import FormatWriter
from ..moments import Moments, RowMap, good_rows
from ..shared_space import RoleMap
from ..storage.paths import StoragePath
from .checkpoints import Checkpoints, Entry, check_unchanged, checksum
from .device_streams import DeviceStreams, ResultBuffers, Sent, batches_on_device, streams_for
from .settings import Settings


@dataclass(frozen=True)
class ShardResult:
    """The result of a task for one shard.

    ``moments`` is None for a shard that is not finished and was not to be read. ``rows_read`` is 0
    for a shard that was finished before.
    """

    index: int
    moments: Moments | None
    rows_read: int
    entry: Entry
    began: float = 0.0  # the time at which the worker began to read


def _ignore_progress(_: int) -> None:
    """Stand in for ``advance`` in other processes, whose progress is seen shard by shard."""


@dataclass(frozen=True)
class ShardTask:
    """The part that the tasks of a pass over a corpus have in common.

    ``identities`` are those of the shards when the run began: a shard that has another one after it
    was read is refused. Nothing is saved without ``checkpoints``. ``reading=False`` reads no shard
    and takes only those that are finished. ``advance`` is called with the rows of each batch.
    """

    name: str
    corpus: Corpus
    identities: tuple[Entry, ...]
    checkpoints: Checkpoints | None
    settings: Settings
    reading: bool
    aligner: ReAlign | RoleMap | None
    advance: Callable[[int], None] = _ignore_progress

    def _batch_rows(self, shard: Shard) -> int:
        return max(1, self.settings.batch_bytes // int(shard.row_bytes))

    def _update(self, moments: Moments, shard: Shard, batch: Batch, through: RowMap | None) -> bool:
        """Add a batch to ``moments``, and return whether it has a bad row."""
        earlier, bad_rows = moments.zero_rows + moments.nonfinite_rows, self.settings.bad_rows
        place: dict[str, Any] = {"where": str(shard.path), "first_row": batch.first}
        try:
            moments.update(batch.rows, through=through, bad_rows=bad_rows, **place)
        except ValueError:
            check_unchanged(shard, self.identities[batch.shard])  # pages that are lost are zeros
            raise
        return moments.zero_rows + moments.nonfinite_rows > earlier


@dataclass(frozen=True)
class MeasureTask(ShardTask):
    """Moments of the rows of a shard, sent through the aligner if there is one."""

    covariance: bool = field(kw_only=True)

    def __call__(self, index: int) -> ShardResult:
        """Measure shard ``index``."""
        began = time.time()
        shard, shard_identity = self.corpus.shards[index], self.identities[index]
        if self.checkpoints and (saved := self.checkpoints.load(shard, shard_identity)):
            return ShardResult(index, saved[0], 0, saved[1])
        if not self.reading:
            return ShardResult(index, None, 0, {})
        moments = Moments(self.covariance, accurate=self.covariance)
        streams = streams_for(self.settings.device)
        through = _on_device(self.aligner, streams).row_map if self.aligner is not None else None
        for batch in batches_on_device(streams, self.corpus, index, self._batch_rows(shard)):
            self._update(moments, shard, batch, through)
            self.advance(len(batch.rows))
        moments, entry = moments.to("cpu"), {}
        check_unchanged(shard, shard_identity)
        if self.checkpoints:
            entry = self.checkpoints.save(shard, shard_identity, moments)
        return ShardResult(index, moments, shard.num_rows, entry, began)


@dataclass(frozen=True)
class AlignTask(ShardTask):
    """The rows of a shard sent through the aligner into ``folder``, under the name of the shard."""

    checkpoints: Checkpoints
    aligner: ReAlign | RoleMap
    folder: StoragePath = field(kw_only=True)

    def __call__(self, index: int) -> ShardResult:
        """Align shard ``index``; the moments are those of the result before it is rounded."""
        return self.start(index)()

    def start(self, index: int) -> Callable[[], ShardResult]:
        """Align shard ``index`` and return a function that syncs it and gives it its name.

        That function has to be called once, by any thread.
        """
        began = time.time()
        shard, shard_identity = self.corpus.shards[index], self.identities[index]
        aligned = self.folder / shard.path.name
        if saved := self.checkpoints.load_aligned(shard, shard_identity, aligned):
            finished = ShardResult(index, saved[0], 0, saved[1])
            return lambda: finished
        if not self.reading:
            return lambda: ShardResult(index, None, 0, {})
        self.checkpoints.forget_aligned(shard)
        with ExitStack() as stack:
            writer = stack.enter_context(self._writer(shard, aligned))
            moments, total = self._write(index, shard, writer)
            check_unchanged(shard, shard_identity)
            writing = stack.pop_all()

        def finish() -> ShardResult:
            """Sync the shard, give it its name and save its checkpoint."""
            writing.close()
            facts = {"name": aligned.name, "checksum": total, **self._expected_rows(moments)}
            save = self.checkpoints.save_aligned
            entry = save(shard, shard_identity, aligned, moments, facts)
            return ShardResult(index, moments, shard.num_rows, entry, began)

        return finish

    @property
    def columns(self) -> int:
        """The number of columns of the result."""
        return self.aligner.columns if isinstance(self.aligner, RoleMap) else self.corpus.dimension

    def _writer(self, shard: Shard, path: StoragePath) -> FormatWriter:
        """Return a writer for the result of a shard, with its other columns."""
        if self.columns == shard.dimension:
            return shard.writer(path)
        return table_writer(shard, path, shard.format, self.corpus.dtype, self.columns)

    def _write(self, index: int, shard: Shard, writer: FormatWriter) -> tuple[Moments, int]:
        """Align a shard into a writer; while a batch is computed, those before it are written.

        The moments are those of the result or, for an index, those of the directions of the rows.
        Leaving the pool waits for its thread, so no write is in flight when this returns or raises.
        """
        moments, total = Moments(), 0
        streams = streams_for(self.settings.device)
        size = max(1, min(self._batch_rows(shard), shard.num_rows))
        buffers = ResultBuffers(streams, size, self.columns, self.corpus.dtype)
        writes: deque[Future[None]] = deque()

        def write(sent: Sent) -> None:
            """Write a result once its rows are on the host."""
            nonlocal total
            rows = buffers.rows_of(sent)
            writer.write(rows)
            total = checksum(rows, total)

        aligner = _on_device(self.aligner, streams)
        through = aligner.row_map if isinstance(aligner, ReAlign) else None
        with ThreadPoolExecutor(1, "realign-fast-writer") as disk:
            for batch in batches_on_device(streams, self.corpus, index, size):
                if len(writes) == buffers.slots:
                    writes.popleft().result()
                rows, result = batch.rows, buffers.next(len(batch.rows))
                has_bad_row = self._update(moments, shard, batch, through)
                aligner(rows, out=result)
                if has_bad_row and self.settings.bad_rows == "skip":
                    result[~good_rows(rows)] = 0
                writes.append(disk.submit(write, buffers.send(len(rows))))
                self.advance(len(rows))
            while writes:
                writes.popleft().result()
            return moments.to("cpu"), total

    def _expected_rows(self, moments: Moments) -> Entry:
        """Return how many rows of the result are zero and how many are NaN."""
        zero, nonfinite = moments.zero_rows, moments.nonfinite_rows
        if self.settings.bad_rows == "skip":
            return {"zero_rows": zero + nonfinite, "nan_rows": 0}
        stays_zero = zero and not bool(self.aligner(torch.zeros(1, self.corpus.dimension)).any())
        return {"zero_rows": zero * stays_zero, "nan_rows": nonfinite}


def map_overlapping_sync(task: AlignTask, shards: Sequence[int]) -> Iterator[ShardResult]:
    """Map a task as ``map`` does, but sync each shard while the next one is computed.

    A shard that was written gets its name whatever becomes of the others: leaving the pool waits
    for it.
    """
    with ThreadPoolExecutor(1, "realign-fast-sync") as disk:
        results: deque[Future[ShardResult]] = deque()
        for index in shards:
            results.append(disk.submit(task.start(index)))
            if len(results) == 2:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()


def _on_device(aligner: ReAlign | RoleMap, streams: DeviceStreams | None) -> ReAlign | RoleMap:
    return aligner if streams is None else copy.deepcopy(aligner).to(streams.device)
