"""Copies between host and GPU that overlap the kernels (``--device cuda``).

While a batch is computed, the next one is copied to the device on one stream and the result before
it is copied back on another. Each direction has ``SLOTS`` buffers, which take turns. Events alone
order the copies and the kernels that use one buffer, so no kernel waits for the host. Host memory
is pinned: rows are copied into a pinned buffer first.

Only :class:`DeviceStreams` knows CUDA, so the order of copies is also tested without a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..corpus.corpus import Batch, Corpus
from ..interface.devices import check_device
from ..storage.read_ahead import started_ahead
from .engines.local import worker_number

SLOTS = 3  # one buffer is filled, one is computed on, one waits

Direction = Literal["in", "out"]
Sent = tuple[Tensor, Any]  # a result on its way: its rows on the host, the event of its copy


class DeviceStreams:
    """Two streams for copies beside the current stream of a GPU, on which the kernels run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {name: torch.cuda.Stream(device) for name in ("in", "out")}  # type: ignore[no-untyped-call]

    def host_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Allocate [rows, columns] of pinned memory, which is copied without a wait."""
        return torch.empty(rows, columns, dtype=dtype, pin_memory=True)

    def copy(self, direction: Direction, to: Tensor, source: Tensor, after: list[Any]) -> Any:
        """Start a copy that waits for the events ``after``; return the event of its end."""
        stream = self._streams[direction]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        return stream.record_event()

    def record_event(self) -> Any:
        """Return the event that the kernels launched so far are done."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait_event(self, event: Any) -> None:
        """Let the kernels launched from now on wait for an event; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Let the calling thread wait for an event."""
        event.synchronize()


@lru_cache  # pinning memory takes as long as copying it many times
def streams_for(device: str) -> DeviceStreams | None:
    """Return the streams of a device, None for ``"cpu"``.

    ``"cuda"`` without a number is the GPU that this worker process takes.
    """
    chosen = check_device(device)
    if chosen.type == "cpu":
        return None
    if chosen.index is None:
        chosen = torch.device("cuda", worker_number() % torch.cuda.device_count())
    return DeviceStreams(chosen)


def batches_on_device(
    streams: DeviceStreams | None, corpus: Corpus, index: int, size: int
) -> Iterator[Batch]:
    """Return the batches of shard ``index``, ``size`` rows [size, D] each, on the device.

    The rows of a batch are valid until the next batch is taken, for kernels of the current stream.
    """
    batches = corpus.batches(index, batch_rows=size)
    if streams is None:
        return batches
    return copied_batches(batches, streams, size, corpus.dimension, corpus.dtype)


def copied_batches(
    batches: Iterator[Batch], streams: DeviceStreams, size: int, columns: int, dtype: torch.dtype
) -> Iterator[Batch]:
    """Copy batches of at most ``size`` rows to the device ahead of their use, and yield them."""
    on_device = list(torch.empty(SLOTS, size, columns, dtype=dtype, device=streams.device))
    pinned = [streams.host_buffer(size, columns, dtype) for _ in range(SLOTS)]
    # Of each slot, the event that its last kernels are done (at first: of the memory's last user).
    released: list[Any] = [streams.record_event()] * SLOTS
    events: deque[Any] = deque(maxlen=SLOTS)  # of the last copies, which may be in flight

    def copies() -> Iterator[tuple[Batch, int, Any]]:
        """Start the copy of one batch after another; yield each with its slot and its event."""
        for number, batch in enumerate(batches):
            slot = number % SLOTS
            rows = pinned[slot][: len(batch.rows)].copy_(batch.rows)
            event = streams.copy("in", on_device[slot][: len(rows)], rows, [released[slot]])
            events.append(event)
            yield batch, slot, event

    try:
        for batch, slot, event in started_ahead(copies(), SLOTS):
            streams.wait_event(event)
            yield Batch(batch.shard, batch.first, on_device[slot][: len(batch.rows)])
            released[slot] = streams.record_event()
            streams.synchronize(event)  # the rows on the host were copied: their memory may go
    finally:  # no copy is in flight when its buffers go
        for event in events:
            streams.synchronize(event)


class ResultBuffers:
    """Buffers [rows, columns] in which results are computed, and their way to the host."""

    def __init__(
        self, streams: DeviceStreams | None, rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        self._streams, self._number = streams, -1
        self.slots, device = (2, "cpu") if streams is None else (SLOTS, streams.device)
        self._results = list(torch.empty(self.slots, rows, columns, dtype=dtype, device=device))
        self._host = self._results
        if streams is not None:
            self._host = [streams.host_buffer(rows, columns, dtype) for _ in range(SLOTS)]

    def next(self, count: int) -> Tensor:
        """Return the buffer [count, columns] for the next result.

        It overwrites the rows that :meth:`rows_of` gave ``slots`` results ago.
        """
        self._number += 1
        buffer: Tensor = self._results[self._number % self.slots]
        return buffer[:count]

    def send(self, count: int) -> Sent:
        """Start the copy of the result that was computed; :meth:`rows_of` waits for its end."""
        slot = self._number % self.slots
        host = self._host[slot][:count]
        if self._streams is None:
            return host, None
        after = [self._streams.record_event()]
        return host, self._streams.copy("out", host, self._results[slot][:count], after)

    def rows_of(self, sent: Sent) -> Tensor:
        """Return the rows of a result on the host, from any thread, once they have arrived."""
        host, event = sent
        if self._streams is not None:
            self._streams.synchronize(event)
        return host
