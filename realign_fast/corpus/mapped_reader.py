"""Rows of a local `ContiguousShard`, in blocks: through the native reader or Python's mmap.

The native reader (`csrc/io`) maps windows of the file and brings their pages in on threads of its
own, so a cold file is read while the rows before are computed on, and rows are never copied.
Without it (no compiler at installation) Python maps the same windows and asks the kernel to read
ahead. Batches are the same rows either way.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from ..storage.paths import OpenedFile, explained
from . import io_extension

if TYPE_CHECKING:
    from .shard import ContiguousShard

BLOCK_BYTES = 16 << 20  # more only where one batch is larger
BLOCKS_AHEAD = 6  # with 2, reading and writing at once reaches a third of the rate
THREADS = 1  # each brings in a whole block; two compete for the disk's read-ahead
RING_THREADS = 4  # they copy out of the page cache, or have several large reads in flight
WINDOW_ALIGNMENT = 2 << 20  # on this grid the kernel can map cached files by huge pages

Blocks: TypeAlias = Iterator[tuple[int, Any, int]]  # first row, memory, byte in it of that row


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
        make_blocks = _native_blocks if io_extension.io else _mapped_blocks
        for start, block, offset in make_blocks(file, shard, block_first, step, ring):
            for row in range(start, min(start + step, shard.num_rows), batch_rows):
                if file.size != shard.file_bytes:
                    raise shard.changed_error()  # touching a page that is gone would be a SIGBUS
                low, high = max(row, first), min(row + batch_rows, shard.num_rows)
                skip = offset + (low - start) * shard.row_bytes
                count = (high - low) * shard.dimension
                rows = torch.frombuffer(block, dtype=shard.torch_dtype, count=count, offset=skip)
                yield low, rows.view(-1, shard.dimension)
                del rows  # or it would keep the block in memory
            del block


def take(shard: ContiguousShard, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """Read the rows at `ids` into the bytes `target[places]`, each by itself."""
    with shard.opened() as file:
        for row, place in zip(ids.tolist(), places.tolist(), strict=True):
            offset = shard.offset + row * shard.row_bytes
            if os.preadv(file.fileno(), [target[place]], offset) != shard.row_bytes:
                raise shard.changed_error()


def _native_blocks(
    file: OpenedFile, shard: ContiguousShard, first: int, step: int, ring: Any
) -> Blocks:
    limits = shard.offset + first * shard.row_bytes, shard.file_bytes
    options: dict[str, Any] = {"ahead": BLOCKS_AHEAD, "threads": THREADS}
    if ring is not None:
        options |= {"ring": ring, "threads": RING_THREADS}
        options |= {"direct": not _is_cached(file.fileno(), shard.file_bytes - 1)}
    reader = io_extension.io.ShardReader(file.fileno(), *limits, step * shard.row_bytes, **options)
    for row in range(first, shard.num_rows, step):
        try:
            yield row, next(reader), 0
        except EOFError as error:
            raise shard.changed_error() from error


def _mapped_blocks(
    file: OpenedFile, shard: ContiguousShard, first: int, step: int, _ring: None
) -> Blocks:
    for row in range(first, shard.num_rows, step):
        start = shard.offset + row * shard.row_bytes
        end = min(start + step * shard.row_bytes, shard.file_bytes)
        _announce(file.fileno(), start, min(end + 2 * BLOCK_BYTES, shard.file_bytes))
        low = start - start % WINDOW_ALIGNMENT
        window = mmap.mmap(file.fileno(), end - low, access=mmap.ACCESS_COPY, offset=low)
        yield row, window, start - low
        del window


def _announce(descriptor: int, start: int, end: int) -> None:
    """Ask the kernel to read ahead, unless the end is cached: the request costs 7-11% then."""
    if hasattr(os, "posix_fadvise") and not _is_cached(descriptor, end - 1):  # Linux
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Return whether the byte at `offset` of a file can be read without its disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:
        return False
    return True
