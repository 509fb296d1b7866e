"""Bytes of something far away: several large requests in flight, delivered in order.

What is read from is anything with `size` and `pread(count, offset)`, which may wait long and is
called from several threads. Memory is what is in flight: `IN_FLIGHT` pieces, never the whole.
"""

from __future__ import annotations

import io
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

IN_FLIGHT = 8  # requests at a time: one alone gives a connection's speed, and waits between
PIECE_BYTES = 4 << 20  # of a request, where all that follows is wanted
BLOCK_BYTES = 1 << 20  # of a request, where a reader jumps about
BLOCKS_KEPT = 24  # of a file that is read, so that columns read in turns do not fetch twice


class Source(Protocol):
    """What bytes can be asked of."""

    @property
    def size(self) -> int: ...

    def pread(self, count: int, offset: int) -> bytes: ...


def pieces(source: Source, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin..end` in order, in pieces of `PIECE_BYTES`."""
    starts = range(begin, end, PIECE_BYTES)
    return spans(source, ((start, min(start + PIECE_BYTES, end)) for start in starts))


def spans(source: Source, wanted: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of each `(begin, end)` in order; `IN_FLIGHT` of them are on their way."""
    pool, waiting = ThreadPoolExecutor(IN_FLIGHT, "realign-fast-fetch"), deque()
    try:
        for begin, end in wanted:
            waiting.append(pool.submit(source.pread, end - begin, begin))
            if len(waiting) == IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def fill(source: Source, begin: int, target: memoryview) -> None:
    """Bytes from `begin` on into `target`, as many as it holds."""
    place = 0
    for piece in pieces(source, begin, begin + len(target)):
        target[place : place + len(piece)] = piece
        place += len(piece)


class ReadAhead(io.RawIOBase):
    """A file to read and seek in. The longer it is read in sequence, the more it reads ahead."""

    def __init__(self, source: Source) -> None:
        self._source, self._size, self._at = source, source.size, 0
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "realign-fast-fetch")
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()  # the oldest use first

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if place < 0:
            raise ValueError(f"seek: got place {place}, expected one from 0")
        self._at = place
        return place

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        block, skip = divmod(self._at, BLOCK_BYTES)
        data = self._block(block)[skip : skip + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._blocks.clear()
        super().close()

    def _block(self, number: int) -> bytes:
        before = 0  # blocks in sequence that led here
        while before < IN_FLIGHT - 1 and number - before - 1 in self._blocks:
            before += 1
        for wanted in range(number, number + before + 1):
            if wanted not in self._blocks and wanted * BLOCK_BYTES < self._size:
                start = wanted * BLOCK_BYTES
                count = min(BLOCK_BYTES, self._size - start)
                self._blocks[wanted] = self._pool.submit(self._source.pread, count, start)
        self._blocks.move_to_end(number)
        while len(self._blocks) > BLOCKS_KEPT:
            self._blocks.popitem(last=False)[1].cancel()
        return self._blocks[number].result()
