"""Rows of a `ContiguousShard`: in mapped blocks, or by ranges that are read ahead.

The native reader (`csrc/io`) maps windows of the file and brings their pages in on threads of its
own, so a cold file is read while the rows before are computed on, and rows are never copied. Rows
that are not aligned to their number type are read into buffers instead. Ranges are read where the
file is remote or nothing is compiled, several at a time. Batches are the same rows either way. A
file that becomes shorter is an error; in a mapped window this takes
`io_extension.survive_lost_pages`, which commands and their workers call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..storage import read_ahead
from ..storage.paths import OpenedFile, explained
from . import io_extension

if TYPE_CHECKING:
    from .shard import ContiguousShard

BLOCK_BYTES = 16 << 20  # more only where one batch is larger
BLOCKS_AHEAD = 6  # with 2, reading and writing at once reaches a third of the rate
THREADS = 1  # each brings in a whole block; two compete for the disk's read-ahead
RING_THREADS = 4  # they copy out of the page cache, or have several large reads in flight
GAP_BYTES = 32 << 10  # between wanted rows: fewer bytes cost less to fetch than another request


def block_rows(row_bytes: int, batch_rows: int) -> int:
    """Return the number of rows of a block: whole batches of `batch_rows` rows."""
    return max(1, BLOCK_BYTES // (batch_rows * row_bytes)) * batch_rows


def read(
    shard: ContiguousShard, first: int, batch_rows: int, ring: Any = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(row number, rows [n, D])` from row `first` on; see `Shard.read`.

    With a `ring` (`_io.Ring`, of buffers for such blocks) the rows lie in its buffers.
    """
    step = block_rows(shard.row_bytes, batch_rows)
    block_first = first - first % batch_rows
    with shard.opened() as file, explained(shard.path):
        for start, block in _blocks(file, shard, block_first, step, ring):
            for row in range(start, min(start + step, shard.num_rows), batch_rows):
                _check(file, shard, block)
                low, high = max(row, first), min(row + batch_rows, shard.num_rows)
                skip = (low - start) * shard.row_bytes
                count = (high - low) * shard.dimension
                rows = torch.frombuffer(block, dtype=shard.torch_dtype, count=count, offset=skip)
                yield low, rows.view(-1, shard.dimension)
                del rows  # or it would keep the block in memory
            _check(file, shard, block)
            del block


def _check(file: OpenedFile, shard: ContiguousShard, block: Any) -> None:
    """Raise an error if the file has another size, or had while the block was computed on."""
    is_lost = getattr(block, "lost", False)
    if is_lost or file.size != shard.file_bytes:
        for row in range(shard.num_rows if is_lost else 0):  # has the disk failed? This tells
            file.pread(shard.row_bytes, shard.offset + row * shard.row_bytes)
        raise shard.changed_error()


def take(shard: ContiguousShard, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """Read the rows at `ids` into the bytes `target[places]`, each by itself."""
    with shard.opened() as file:
        for row, place in zip(ids.tolist(), places.tolist(), strict=True):
            offset = shard.offset + row * shard.row_bytes
            if os.preadv(file.fileno(), [target[place]], offset) != shard.row_bytes:
                raise shard.changed_error()


def _blocks(
    file: OpenedFile, shard: ContiguousShard, first: int, step: int, ring: Any
) -> Iterator[tuple[int, Any]]:
    """Yield the first row of each block, and memory that begins with it."""
    limits = shard.offset + first * shard.row_bytes, shard.file_bytes
    options: dict[str, Any] = {"ahead": BLOCKS_AHEAD, "threads": THREADS}
    is_aligned = shard.offset % shard.dtype.itemsize == 0
    if ring is None and not is_aligned:
        ring = io_extension.io.Ring(BLOCKS_AHEAD + 2, step * shard.row_bytes)
    if ring is not None:  # a direct read would keep the place of the rows within a page
        direct = is_aligned and not _is_cached(file.fileno(), shard.file_bytes - 1)
        options |= {"ring": ring, "threads": RING_THREADS, "direct": direct}
    reader = io_extension.io.ShardReader(file.fileno(), *limits, step * shard.row_bytes, **options)
    for row in range(first, shard.num_rows, step):
        try:
            yield row, next(reader)
        except EOFError as error:
            raise shard.changed_error() from error


def _is_cached(descriptor: int, offset: int) -> bool:
    """Return whether the byte at `offset` of a file can be read without its disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def read_ranges(
    shard: ContiguousShard, first: int, batch_rows: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(row number, rows [n, D])` from row `first` on; see `Shard.read`."""
    stamp, step = shard.path.stamp(), max(1, read_ahead.PIECE_BYTES // shard.row_bytes)
    starts = range(first, shard.num_rows, step)
    runs = [(row, min(row + step, shard.num_rows)) for row in starts]
    try:
        for row, batch in shard.rebatched(_fetched(shard, runs), first, batch_rows):
            yield row, batch.view(shard.torch_dtype)
    except OSError as error:  # an object that has become shorter cannot be read to its old end
        if shard.path.exists() and shard.path.stamp() != stamp:
            raise shard.changed_error() from error
        raise
    if shard.path.stamp() != stamp:
        raise shard.changed_error()


def take_ranges(
    shard: ContiguousShard, ids: np.ndarray, target: np.ndarray, places: np.ndarray
) -> None:
    """Fetch the rows at sorted `ids` into the bytes `target[places]`; near ones share a request."""
    most = max(1, read_ahead.PIECE_BYTES // shard.row_bytes)
    is_apart = (np.diff(ids) > 1 + GAP_BYTES // shard.row_bytes) | (np.diff(ids // most) > 0)
    parts = np.split(np.arange(len(ids)), np.flatnonzero(is_apart) + 1)
    runs = [(int(ids[part[0]]), int(ids[part[-1]]) + 1) for part in parts]
    for part, (first, _), rows in zip(parts, runs, _fetched(shard, runs), strict=True):
        target[places[part]] = rows[ids[part] - first]


def _fetched(shard: ContiguousShard, runs: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield the bytes `[n, row_bytes]` of each run of rows `first..end`."""
    start, size = shard.offset, shard.row_bytes
    ranges = [(start + first * size, start + end * size) for first, end in runs]
    with shard.opened() as file:
        for (begin, end), data in zip(ranges, read_ahead.spans(file.pread, ranges), strict=True):
            if len(data) != end - begin:
                raise shard.changed_error()
            yield np.frombuffer(data, np.uint8).reshape(-1, size)
