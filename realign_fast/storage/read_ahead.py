"""Reading remote bytes: several large requests in flight, delivered in order.

``pread`` may wait long and is called from several threads. At most ``IN_FLIGHT`` pieces are in
memory, never a whole file.
"""

from __future__ import annotations

import io
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Pread = Callable[[int, int], bytes]  # of a number of bytes and an offset

IN_FLIGHT = 8  # requests at a time: one alone gets a connection's speed, and waits in between
PIECE_BYTES = 4 << 20  # of a request, where all following bytes are needed
FIRST_BYTES = 128 << 10  # of a request, where a reader has jumped to
CACHED_BYTES = 48 << 20  # of a file, so that columns that are read in turns are not fetched twice


def pieces(pread: Pread, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes ``start..stop`` in order, in pieces of ``PIECE_BYTES``."""
    starts = range(start, stop, PIECE_BYTES)
    return spans(pread, ((first, min(first + PIECE_BYTES, stop)) for first in starts))


def spans(pread: Pread, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of each ``(start, stop)`` in order; ``IN_FLIGHT`` requests run at a time."""
    pool = ThreadPoolExecutor(IN_FLIGHT, "realign-fast-fetch")
    requests = (pool.submit(pread, stop - start, start) for start, stop in ranges)
    try:
        for request in started_ahead(requests, IN_FLIGHT):
            yield _result_of(request)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result_of(request: Future[bytes]) -> bytes:
    while not request.done():
        wait([request], 1)  # no longer: only between two waits can a worker process be stopped
    return request.result()


def started_ahead(items: Iterable[Item], limit: int) -> Iterator[Item]:
    """Yield items in order, ``limit`` of them begun: making an item begins its work."""
    begun: deque[Item] = deque()
    for item in items:
        begun.append(item)
        if len(begun) == limit:
            yield begun.popleft()
    yield from begun


class ReadAhead(io.RawIOBase):
    """A file to read and seek in. The longer it is read in sequence, the more it reads ahead.

    A jump fetches ``FIRST_BYTES``. A reader that goes on behind them gets pieces of twice the size
    each, up to ``PIECE_BYTES``, and with each doubling one more piece ahead, but none of what lies
    behind byte ``ahead_until``. ``error`` is the last error of a request, for readers that lose it.
    """

    def __init__(self, pread: Pread, size: int) -> None:
        self._pread, self._size, self._position = pread, size, 0
        self.ahead_until = size
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "realign-fast-fetch")
        # Keyed by the start of a piece: its stop, and its bytes to be. The oldest use is first.
        self._pieces: OrderedDict[int, tuple[int, Future[bytes]]] = OrderedDict()
        self.error: OSError | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it; ValueError if it would be negative."""
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        position = offset + bases[whence]
        if position < 0:
            raise ValueError(f"seek: got position {position}, expected 0 or more")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the current piece; return the number of bytes, 0 at the end."""
        if self._position >= self._size:
            return 0
        start = self._requested_piece()
        try:
            piece = _result_of(self._pieces[start][1])
        except OSError as error:
            self.error = error
            raise
        data = memoryview(piece)[self._position - start :][: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Forget the pieces and cancel what was requested."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pieces.clear()
        super().close()

    def _requested_piece(self) -> int:
        """Request the piece of the next byte and pieces behind it; return where it starts."""
        position, pieces = self._position, self._pieces.items()
        start = next((first for first, (stop, _) in pieces if first <= position < stop), None)
        if start is None:
            before = next((first for first, (stop, _) in pieces if stop == position), None)
            length = FIRST_BYTES if before is None else 2 * (position - before)
            self._request(position, length)
            start = position
        self._pieces.move_to_end(start)
        stop = self._pieces[start][0]
        length = stop - start
        for _ in range((length // FIRST_BYTES).bit_length() - 1):
            if stop not in self._pieces and stop < min(self.ahead_until, self._size):
                self._request(stop, 2 * length)
            if stop in self._pieces:
                length, stop = self._pieces[stop][0] - stop, self._pieces[stop][0]
        while sum(stop - first for first, (stop, _) in pieces) > CACHED_BYTES:
            self._pieces.popitem(last=False)[1][1].cancel()
        return start

    def _request(self, start: int, length: int) -> None:
        end = self.ahead_until if start < self.ahead_until else self._size
        stop = min(start + min(length, PIECE_BYTES), end, self._size)
        self._pieces[start] = stop, self._pool.submit(self._pread, stop - start, start)
