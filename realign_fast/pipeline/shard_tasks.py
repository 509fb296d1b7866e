"""The tasks of a pass: measure one shard, or align it. An engine maps a task over the shards.

A task is called with the index of a shard, which it does not read again if the shard is finished
and unchanged. Tasks can be pickled, for engines that run them in other processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..align import ReAlign
from ..corpus.convert import table_writer
from ..corpus.corpus import Batch, Corpus
from ..corpus.shard import FormatWriter, Shard
from ..interface.devices import check_device
from ..interface.option_values import OptionError
from ..moments import Moments, good_rows
from ..ops import align_rows, working_dtype
from ..ops.dispatch import CHOOSER
from ..storage.paths import StoragePath
from .checkpoints import AnyMap, Checkpoints, Entry, check_unchanged, checksum
from .engines.local import worker_number
from .settings import Settings


@dataclass(frozen=True)
class ShardResult:
    """The result of a task for one shard."""

    index: int
    moments: Moments | None  # None: it is not finished, and was not to be read
    rows_read: int  # 0: it was finished before
    entry: Entry


@dataclass(frozen=True)
class ShardTask:
    """The moments of a shard, and its rows sent through a map into ``folder`` if there is one.

    The moments are those of mapped rows, before they are rounded; of rows that are written into an
    index they are those of their directions.
    """

    name: str
    corpus: Corpus
    identities: tuple[Entry, ...]  # when the run began: a shard that changes is refused
    checkpoints: Checkpoints | None  # None: nothing is saved
    settings: Settings
    reading: bool  # False: take only shards that are finished
    row_map: AnyMap | None
    covariance: bool
    folder: StoragePath | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)  # chosen for GPUs where the run began
    advance: Callable[[int], None] | None = None  # called with the rows of each batch

    def __call__(self, index: int) -> ShardResult:
        """Measure shard ``index``, or write its result under its name."""
        return self.start(index)()

    def start(self, index: int) -> Callable[[], ShardResult]:
        """Read shard ``index``; return a function, to call once, to sync and name its result."""
        checkpoints = self.checkpoints
        shard, shard_identity = self.corpus.shards[index], self.identities[index]
        result = self.folder / shard.path.name if self.folder is not None else None
        saved = checkpoints.load(shard, shard_identity, result) if checkpoints else None
        if saved or not self.reading:
            moments, entry = saved or (None, {})
            return lambda: ShardResult(index, moments, 0, entry)
        with ExitStack() as stack:
            writer = None
            if result and checkpoints:
                checkpoints.forget(shard)
                writer = stack.enter_context(self._writer(shard, result))
            moments, total = self.read(index, writer)
            check_unchanged(shard, shard_identity)
            writing = stack.pop_all()

        def finish() -> ShardResult:
            """Sync the shard, give it its name and save its checkpoint."""
            writing.close()
            facts = {}
            if result:
                facts = {"name": result.name, "checksum": total, **self._expected_rows(moments)}
            save = checkpoints.save if checkpoints else lambda *_: {}
            entry = save(shard, shard_identity, moments, result, facts)
            return ShardResult(index, moments, shard.num_rows, entry)

        return finish

    @property
    def columns(self) -> int:
        """The number of columns of the result."""
        return int(getattr(self.row_map, "columns", self.corpus.dimension))

    def _writer(self, shard: Shard, path: StoragePath) -> FormatWriter:
        """Return a writer for the result of a shard, with its other columns."""
        if self.columns == shard.dimension:
            return shard.writer(path)
        return table_writer(shard, path, shard.format, self.corpus.dtype, self.columns)

    def read(self, index: int, writer: FormatWriter | None = None) -> tuple[Moments, int]:
        """Return moments, and the checksum of what was written while later batches were computed.

        Leaving the pool waits for its thread, so no write is in flight when this returns or raises.
        """
        shard = self.corpus.shards[index]
        moments, total = Moments(self.covariance, accurate=self.covariance), 0
        device = worker_device(self.settings.device)
        if device.type == "cuda":
            if not self.kernels:
                raise OptionError("--backend: the run began without a GPU; give cuda or triton")
            CHOOSER.keep(self.kernels)  # so that no worker's bytes depend on its own verdict
        size = self.settings.batch_bytes // shard.row_bytes
        size = max(1, min(size, shard.num_rows))
        row_map: Any = self.row_map
        if row_map is not None and device.type == "cuda":
            row_map = copy.deepcopy(row_map).to(device)
        through: Any = None
        if isinstance(row_map, ReAlign) or (row_map is not None and writer is None):
            through = row_map.row_map
        # A map by a number is as fast twice.
        maps_once = through is not None and (callable(through) or through[0].dim() > 0)
        # One result is written, from the host, while the next one is computed.
        shape, dtype = (2, size if writer else 0, self.columns), self.corpus.dtype
        results = torch.empty(shape, dtype=dtype, device=device)

        def write(result: Tensor, writer: FormatWriter) -> None:
            """Write a result and add it to the checksum."""
            nonlocal total
            rows = result.cpu()
            writer.write(rows)
            total = checksum(rows, total)

        writes = list[Future[None]]()
        with ThreadPoolExecutor(1, "realign-fast-writer") as disk:
            for number, batch in enumerate(self.corpus.batches(index, batch_rows=size)):
                rows = batch.rows.to(device)
                if self.advance:
                    self.advance(len(rows))
                if writer is None:
                    self._update(moments, batch, rows, through)
                    continue
                result = results[number % 2, : len(rows)]
                mapping = mapped_into(through, result) if maps_once else through
                has_bad_row = self._update(moments, batch, rows, mapping)
                try:
                    if has_bad_row or not maps_once:
                        row_map(rows, out=result)
                except ValueError as error:
                    raise ValueError(f"{shard.path}: {error}") from error
                if has_bad_row and self.settings.bad_rows == "skip":
                    result[~good_rows(rows)] = 0
                writes.append(disk.submit(write, result, writer))
                if len(writes) == 2:
                    writes.pop(0).result()
            for last in writes:
                last.result()
        return moments.to("cpu"), total

    def _update(self, moments: Moments, batch: Batch, rows: Tensor, through: Any) -> bool:
        """Add the rows of a batch to ``moments``, and return whether one is a bad row."""
        shard = self.corpus.shards[batch.shard]
        earlier, bad_rows = moments.zero_rows + moments.nonfinite_rows, self.settings.bad_rows
        place: dict[str, Any] = {"where": str(shard.path), "first_row": batch.first}
        try:
            moments.update(rows, through=through, bad_rows=bad_rows, **place)
        except ValueError:
            check_unchanged(shard, self.identities[batch.shard])  # pages that are lost are zeros
            raise
        return moments.zero_rows + moments.nonfinite_rows > earlier

    def _expected_rows(self, moments: Moments) -> Entry:
        """Return how many rows of the result are zero and how many are NaN."""
        zero, nonfinite = moments.zero_rows, moments.nonfinite_rows
        if self.settings.bad_rows == "skip":
            return {"zero_rows": zero + nonfinite, "nan_rows": 0}
        if zero and self.row_map is not None:
            image = self.row_map(torch.zeros(1, self.corpus.dimension))
            zero *= not bool(image.any())
        return {"zero_rows": zero, "nan_rows": nonfinite}


def worker_device(name: str) -> torch.device:
    """Return the device of a setting; ``"cuda"`` is the GPU that this worker process takes."""
    device = check_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", worker_number() % torch.cuda.device_count())
    return device


def mapped_into(through: Any, result: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a map of blocks of rows, which also writes them into ``result`` in turn.

    The moments are those of rows before they are rounded, and the products of a matrix are computed
    once.
    """
    remaining = result

    def mapping(block: Tensor) -> Tensor:
        """Map a block; blocks after the end of the result are mapped alone."""
        nonlocal remaining
        part, remaining = remaining[: len(block)], remaining[len(block) :]
        if not callable(through):
            dtype = working_dtype(block)
            if dtype == part.dtype and len(part) == len(block):
                return align_rows(block, *through, out=part)
            mapped = align_rows(block, *through, out_dtype=dtype)
        else:
            mapped = through(block)
        part.copy_(mapped[: len(part)])
        return mapped

    return mapping


def map_overlapping_sync(task: ShardTask, shards: Sequence[int]) -> Iterator[ShardResult]:
    """Map a task as ``map`` does, but sync each shard while the next one is computed."""
    with ThreadPoolExecutor(1, "realign-fast-sync") as disk:
        started = list[Future[ShardResult]]()
        for index in shards:
            started.append(disk.submit(task.start(index)))
            if len(started) == 2:
                yield started.pop(0).result()
        yield from (last.result() for last in started)
