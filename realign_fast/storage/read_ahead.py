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
FIRST_BYTES = 128 << 10  # of a request, where a reader has jumped to
KEPT_BYTES = 48 << 20  # of a file, so that columns that are read in turns are not fetched twice


class ByteSource(Protocol):
    """Something that returns bytes at an offset."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def pread(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes from ``offset`` on, fewer only at the end."""


def pieces(source: ByteSource, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin..end` in order, in pieces of `PIECE_BYTES`."""
    starts = range(begin, end, PIECE_BYTES)
    return spans(source, ((start, min(start + PIECE_BYTES, end)) for start in starts))


def spans(source: ByteSource, wanted: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of each `(begin, end)` in order; `IN_FLIGHT` of them are on their way."""
    pool = ThreadPoolExecutor(IN_FLIGHT, "realign-fast-fetch")
    waiting: deque[Future[bytes]] = deque()
    try:
        for begin, end in wanted:
            waiting.append(pool.submit(source.pread, end - begin, begin))
            if len(waiting) == IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def fill(source: ByteSource, begin: int, target: memoryview) -> None:
    """Bytes from `begin` on into `target`, as many as it holds."""
    place = 0
    for piece in pieces(source, begin, begin + len(target)):
        target[place : place + len(piece)] = piece
        place += len(piece)


class ReadAhead(io.RawIOBase):
    """A file to read and seek in. The longer it is read in sequence, the more it reads ahead.

    A jump fetches `FIRST_BYTES`; whoever reads on behind them gets pieces of twice the size each,
    up to `PIECE_BYTES`, and with each doubling one more is asked for before it is needed.
    `error` is what its source last raised, for readers that lose it.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source, self._size, self._at = source, source.size, 0
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "realign-fast-fetch")
        # By where they begin: where they end, and their bytes to be; the oldest use first.
        self._pieces: OrderedDict[int, tuple[int, Future[bytes]]] = OrderedDict()
        self.error: OSError | None = None

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
        begin = self._begin()
        try:
            piece = self._pieces[begin][1].result()
        except OSError as error:
            self.error = error
            raise
        data = memoryview(piece)[self._at - begin :][: len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pieces.clear()
        super().close()

    def _begin(self) -> int:
        """Where the piece of the next byte begins; it and those behind it are on their way."""
        at, held = self._at, self._pieces.items()
        begin = next((first for first, (end, _) in held if first <= at < end), None)
        if begin is None:
            before = next((first for first, (end, _) in held if end == at), None)
            self._ask(at, FIRST_BYTES if before is None else 2 * (at - before))
            begin = at
        self._pieces.move_to_end(begin)
        end = self._pieces[begin][0]
        length = end - begin
        for _ in range((length // FIRST_BYTES).bit_length() - 1):
            if end not in self._pieces and end < self._size:
                self._ask(end, 2 * length)
            if end in self._pieces:
                length, end = self._pieces[end][0] - end, self._pieces[end][0]
        while sum(end - first for first, (end, _) in held) > KEPT_BYTES:
            self._pieces.popitem(last=False)[1][1].cancel()
        return begin

    def _ask(self, begin: int, length: int) -> None:
        end = min(begin + min(length, PIECE_BYTES), self._size)
        self._pieces[begin] = end, self._pool.submit(self._source.pread, end - begin, begin)
