"""Rows through a device: a lane in, kernels, a lane out, all at once (`--device cuda`).

A batch is copied to the device on one stream while the one before is computed and the result of
the one before that is copied back on another. ``SLOTS`` buffers a lane take turns; what may reuse
a buffer, and when, is said by events alone, so no kernel waits for the host. Host memory is pinned:
rows in memory of the corpus's own are copied into a pinned buffer first.

:class:`CudaLanes` are streams of a GPU; :func:`through` and :class:`Outlet` know no device, so that
their order of copies is also tested without one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .._device import check_device
from ..corpus.corpus import Batch, Corpus
from ..corpus.io_extension import io
from ..corpus.mapped_reader import BLOCKS_AHEAD, block_rows
from .engines.local import worker_number

SLOTS = 3  # one is filled, one is computed on, one waits
BUFFERS = BLOCKS_AHEAD + SLOTS + 1  # of a ring: read ahead, being copied, and one more


Sent = tuple[Tensor, Any]  # a result on its way: its rows on the host, an event


class Lanes(Protocol):
    """Copies that run beside the kernels; an event is whatever ``mark`` and ``copy`` return."""

    device: torch.device

    def host_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies need not wait for, [rows, columns]."""

    def copy(self, lane: str, to: Tensor, source: Tensor, after: list[Any]) -> Any:
        """Copy on lane ``"in"`` or ``"out"`` once the events have come; an event for its end."""

    def ring(self, bytes: int) -> Any:
        """Pinned buffers (`_io.Ring`) for blocks of so many bytes; None without a native reader."""

    def mark(self) -> Any:
        """An event: the kernels launched so far are done."""

    def hold(self, event: Any) -> None:
        """The kernels launched from now on wait for an event; the host does not."""

    def finish(self, event: Any) -> None:
        """The calling thread waits for an event."""


class CudaLanes:
    """Two streams beside the current one of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in ("in", "out")}
        self._ring, self._ring_bytes = None, 0

    def host_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, pin_memory=True)

    def ring(self, bytes: int) -> Any:
        if io is not None and (self._ring is None or self._ring_bytes != bytes):
            self._unpin()
            ring, runtime = io.Ring(BUFFERS, bytes), torch.cuda.cudart()
            for address in ring.addresses:
                torch.cuda.check_error(runtime.cudaHostRegister(address, ring.bytes, 0))
            self._ring, self._ring_bytes = ring, bytes
        return self._ring

    def _unpin(self) -> None:
        torch.cuda.synchronize(self.device)
        for address in self._ring.addresses if self._ring is not None else ():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        self._ring = None

    def copy(self, lane: str, to: Tensor, source: Tensor, after: list[Any]) -> torch.cuda.Event:
        stream = self._streams[lane]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        return stream.record_event()

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def hold(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()


@lru_cache  # pinning memory takes as long as copying it many times
def lanes_of(device: str) -> Lanes | None:
    """Lanes to a device (``"cuda"``: this worker's share of the GPUs), None for ``"cpu"``."""
    chosen = check_device(device)
    if chosen.type == "cpu":
        return None
    if chosen.index is None:
        chosen = torch.device("cuda", worker_number() % torch.cuda.device_count())
    return CudaLanes(chosen)


def batches_on(lanes: Lanes | None, corpus: Corpus, index: int, size: int) -> Iterator[Batch]:
    """Batches of ``size`` rows of shard ``index`` with their rows on the device of ``lanes``.

    The rows of one are valid until the next is asked for, for kernels of the current stream.
    """
    if lanes is None:
        yield from corpus.batches(index, batch_rows=size)
        return
    row_bytes = corpus.shards[index].row_bytes
    ring = lanes.ring(block_rows(row_bytes, size) * row_bytes)
    batches = corpus.batches(index, batch_rows=size, ring=ring)
    yield from through(batches, lanes, size, corpus.dimension, corpus.dtype)


def through(
    batches: Iterator[Batch], lanes: Lanes, size: int, columns: int, dtype: torch.dtype
) -> Iterator[Batch]:
    """Batches of at most ``size`` rows, copied to the device ahead of their use."""
    on_device = [torch.empty(size, columns, dtype=dtype, device=lanes.device) for _ in range(SLOTS)]
    pinned: list[Tensor | None] = [None] * SLOTS
    # By slot: the kernels that read it are done (at first those that had this memory before).
    used: list[Any] = [lanes.mark()] * SLOTS
    ahead: deque[tuple[Batch, Tensor, int, Any]] = deque()

    def arrived() -> Iterator[Batch]:
        batch, rows, slot, event = ahead.popleft()
        lanes.hold(event)
        try:
            yield Batch(batch.shard, batch.first, on_device[slot][: len(rows)])
        finally:
            used[slot] = lanes.mark()
            lanes.finish(event)  # the rows of the host are read: their memory may go

    try:
        for number, batch in enumerate(batches):
            slot, rows = number % SLOTS, batch.rows
            if not rows.is_pinned():
                if pinned[slot] is None:
                    pinned[slot] = lanes.host_buffer(size, columns, dtype)
                rows = pinned[slot][: len(rows)].copy_(rows)
            event = lanes.copy("in", on_device[slot][: len(rows)], rows, [used[slot]])
            ahead.append((batch, rows, slot, event))
            if len(ahead) == SLOTS:
                yield from arrived()
        while ahead:
            yield from arrived()
    finally:  # no copy is in flight when its buffers go
        for *_, event in ahead:
            lanes.finish(event)


class Outlet:
    """Where results are computed, and the way from there to the host."""

    def __init__(self, lanes: Lanes | None, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._lanes, self._number = lanes, -1
        if lanes is None:
            self.slots = 2
            self._host = list(torch.empty(self.slots, rows, columns, dtype=dtype))
            self._results = self._host
            return
        self.slots = SLOTS
        self._host = [lanes.host_buffer(rows, columns, dtype) for _ in range(SLOTS)]
        kind = {"dtype": dtype, "device": lanes.device}
        self._results = [torch.empty(rows, columns, **kind) for _ in range(SLOTS)]

    def next(self, rows: int) -> Tensor:
        """Where the next result of so many rows is computed, [rows, columns].

        What :meth:`rows_of` gave ``slots`` results ago is overwritten: the caller has done with it.
        """
        self._number += 1
        return self._results[self._number % self.slots][:rows]

    def send(self, rows: int) -> Sent:
        """Begin to copy the result that was computed; see :meth:`rows_of`."""
        slot = self._number % self.slots
        host = self._host[slot][:rows]
        if self._lanes is None:
            return host, None
        after = [self._lanes.mark()]
        return host, self._lanes.copy("out", host, self._results[slot][:rows], after)

    def rows_of(self, sent: Sent) -> Tensor:
        """The rows of a result on the host, from any thread; waits for them."""
        host, event = sent
        if self._lanes is not None:
            self._lanes.finish(event)
        return host
