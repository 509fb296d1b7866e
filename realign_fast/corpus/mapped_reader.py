"""The rows of a file that holds them in one piece, in blocks: natively, or through Python's mmap.

The native reader (`csrc/io`) maps windows of the file and brings their pages in on threads of its
own, so a cold file is read while the rows before are computed on, and rows are never copied.
Without it (no compiler at installation) Python maps the same windows and asks the kernel to read
ahead. Either way batches are the same rows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import torch

from ..storage.paths import OpenedFile, explained
from . import io_extension
from .formats.npy import TORCH_DTYPES, Shard, changed, opened

BLOCK_BYTES = 16 << 20  # more only where one batch is larger
BLOCKS_AHEAD = 6  # where files are read and written at once, 2 starve: a third of the rate
THREADS = 1  # each brings in a whole block; two compete for the disk's read-ahead
RING_THREADS = 4  # that copy out of the cache, or have several large reads in flight
WINDOW_ALIGNMENT = 2 << 20  # on this grid the kernel can map cached files by huge pages


def block_rows(row_bytes: int, size: int) -> int:
    """Rows in a block, for batches of `size` rows."""
    return max(1, BLOCK_BYTES // (size * row_bytes)) * size


def read_rows(
    shard: Shard, first: int, size: int, ring: Any = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """`(row, rows [n, D])` from row `first` on; batches end at multiples of `size`.

    With a `ring` (`_io.Ring`, of buffers for such blocks) the rows lie in its buffers.
    """
    step = block_rows(shard.row_bytes, size)
    begin = first - first % size
    with opened(shard.path, shard) as (file, _), explained(shard.path):
        if io_extension.io:
            blocks = _native_blocks(file, shard, begin, step, ring)
        else:
            blocks = _mapped_blocks(file, shard, begin, step)
        for start, block, offset in blocks:
            for row in range(start, min(start + step, shard.num_rows), size):
                if os.fstat(file.fileno()).st_size != shard.file_bytes:
                    raise changed(shard)  # touching a page that is gone would be a SIGBUS
                low, high = max(row, first), min(row + size, shard.num_rows)
                skip = offset + (low - start) * shard.row_bytes
                count, dtype = (high - low) * shard.dimension, TORCH_DTYPES[shard.dtype]
                rows = torch.frombuffer(block, dtype=dtype, count=count, offset=skip)
                yield low, rows.view(-1, shard.dimension)
                del rows  # or it would keep the block in memory
            del block


Blocks = Iterator[tuple[int, Any, int]]  # first row, memory, where in it the row begins


def _native_blocks(file: OpenedFile, shard: Shard, begin: int, step: int, ring: Any) -> Blocks:
    edges = shard.offset + begin * shard.row_bytes, shard.file_bytes
    options = {"ahead": BLOCKS_AHEAD, "threads": THREADS}
    if ring is not None:
        options |= {"ring": ring, "threads": RING_THREADS}
        options |= {"direct": not _cached(file.fileno(), shard.file_bytes - 1)}
    reader = io_extension.io.ShardReader(file.fileno(), *edges, step * shard.row_bytes, **options)
    for row in range(begin, shard.num_rows, step):
        try:
            yield row, next(reader), 0
        except EOFError as error:
            raise changed(shard) from error


def _mapped_blocks(file: OpenedFile, shard: Shard, begin: int, step: int) -> Blocks:
    for row in range(begin, shard.num_rows, step):
        start = shard.offset + row * shard.row_bytes
        end = min(start + step * shard.row_bytes, shard.file_bytes)
        _announce(file.fileno(), start, min(end + 2 * BLOCK_BYTES, shard.file_bytes))
        low = start - start % WINDOW_ALIGNMENT
        yield (
            row,
            mmap.mmap(file.fileno(), end - low, access=mmap.ACCESS_COPY, offset=low),
            start - low,
        )


def _announce(descriptor: int, begin: int, end: int) -> None:
    """Ask the kernel to read ahead, unless the end is cached already: asking costs 7-11% then."""
    if hasattr(os, "posix_fadvise") and not _cached(descriptor, end - 1):  # Linux
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)


def _cached(descriptor: int, place: int) -> bool:
    """Whether this byte of a file could be read without its disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT)
    except OSError:
        return False
    return True
