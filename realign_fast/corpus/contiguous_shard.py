"""Shards whose rows lie in one piece of the file: mapped, or read by ranges that are read ahead.

The native reader (`csrc/io`) maps windows of the file and brings their pages in on threads of its
own, so rows are never copied, unless they are not aligned to their number type. Ranges are read
where the file is remote or nothing is compiled. Batches are the same rows either way. A file that
becomes shorter is an error; in a mapped window this takes `io_extension.survive_lost_pages`.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..storage import read_ahead
from ..storage.paths import OpenedFile, explained
from . import io_extension
from .shard import Batches, Shard

BLOCK_BYTES = 16 << 20  # more only where one batch is larger
BLOCKS_AHEAD = 6  # with 2, reading and writing at once reaches a third of the rate
THREADS = 1  # each brings in a whole block; two compete for the disk's read-ahead
RING_THREADS = 4  # they copy out of the page cache, or have several large reads in flight
GAP_BYTES = 32 << 10  # between wanted rows: fewer bytes cost less to fetch than another request


@dataclass(frozen=True)
class ContiguousShard(Shard):
    """A shard whose rows lie in one piece of the file, as numbers in C order."""

    offset: int  # bytes before the first row
    file_bytes: int  # size of the whole file

    @abstractmethod
    def parse(self, file: OpenedFile) -> ContiguousShard:
        """Return the shard that the header of `file` describes now."""

    @contextmanager
    def opened(self) -> Iterator[OpenedFile]:
        """Open the file; an error if its header has changed."""
        with self.path.opened() as file:
            if self.parse(file) != self:
                raise self.changed_error()
            yield file

    def read(self, first: int, batch_rows: int, ring: Any = None) -> Batches:
        """Yield views of the mapped file, or of ranges that were read; see `Shard.read`.

        With a `ring` (`_io.Ring`, of buffers for blocks) the rows lie in its buffers.
        """
        if self.path.is_remote or not io_extension.io:
            return self._read_ranges(first, batch_rows)
        return self._read_blocks(first, batch_rows, ring)

    def take(self, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Read the rows at sorted `ids`; near ones at a URL share a request."""
        if not self.path.is_remote:
            with self.opened() as file:
                for row, place in zip(ids.tolist(), places.tolist(), strict=True):
                    offset = self.offset + row * self.row_bytes
                    if os.preadv(file.fileno(), [target[place]], offset) != self.row_bytes:
                        raise self.changed_error()
            return
        most = max(1, read_ahead.PIECE_BYTES // self.row_bytes)
        is_apart = (np.diff(ids) > 1 + GAP_BYTES // self.row_bytes) | (np.diff(ids // most) > 0)
        parts = np.split(np.arange(len(ids)), np.flatnonzero(is_apart) + 1)
        runs = [(int(ids[part[0]]), int(ids[part[-1]]) + 1) for part in parts]
        for part, (first, _), rows in zip(parts, runs, self._ranges(runs), strict=True):
            target[places[part]] = rows[ids[part] - first]

    def _read_blocks(self, first: int, batch_rows: int, ring: Any) -> Batches:
        step = block_rows(self.row_bytes, batch_rows)
        block_first = first - first % batch_rows
        with self.opened() as file, explained(self.path):
            for start, block in self._blocks(file, block_first, step, ring):
                for row in range(start, min(start + step, self.num_rows), batch_rows):
                    self._check(file, block)
                    low, high = max(row, first), min(row + batch_rows, self.num_rows)
                    skip = (low - start) * self.row_bytes
                    count = (high - low) * self.dimension
                    rows = torch.frombuffer(block, dtype=self.torch_dtype, count=count, offset=skip)
                    yield low, rows.view(-1, self.dimension)
                    del rows  # or it would keep the block in memory
                self._check(file, block)
                del block

    def _check(self, file: OpenedFile, block: Any) -> None:
        """Raise an error if the file has another size, or had while the block was computed on."""
        if block.lost or file.size != self.file_bytes:
            for row in range(self.num_rows if block.lost else 0):  # has the disk failed?
                file.pread(self.row_bytes, self.offset + row * self.row_bytes)
            raise self.changed_error()

    def _blocks(
        self, file: OpenedFile, first: int, step: int, ring: Any
    ) -> Iterator[tuple[int, Any]]:
        """Yield the first row of each block, and memory that begins with it."""
        limits = self.offset + first * self.row_bytes, self.file_bytes
        options: dict[str, Any] = {"ahead": BLOCKS_AHEAD, "threads": THREADS}
        is_aligned = self.offset % self.dtype.itemsize == 0
        if ring is None and not is_aligned:
            ring = io_extension.io.Ring(BLOCKS_AHEAD + 2, step * self.row_bytes)
        if ring is not None:  # a direct read would keep the place of the rows within a page
            direct = is_aligned and not _is_cached(file.fileno(), self.file_bytes - 1)
            options |= {"ring": ring, "threads": RING_THREADS, "direct": direct}
        block_bytes = step * self.row_bytes
        reader = io_extension.io.ShardReader(file.fileno(), *limits, block_bytes, **options)
        for row in range(first, self.num_rows, step):
            try:
                yield row, next(reader)
            except EOFError as error:
                raise self.changed_error() from error

    def _read_ranges(self, first: int, batch_rows: int) -> Batches:
        stamp, step = self.path.stamp(), max(1, read_ahead.PIECE_BYTES // self.row_bytes)
        starts = range(first, self.num_rows, step)
        runs = [(row, min(row + step, self.num_rows)) for row in starts]
        batches = self.rebatched(self._ranges(runs), first, batch_rows, stamp)
        return ((row, batch.view(self.torch_dtype)) for row, batch in batches)

    def _ranges(self, runs: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Yield the bytes `[n, row_bytes]` of each run of rows `first..end`."""
        start, size = self.offset, self.row_bytes
        ranges = [(start + first * size, start + end * size) for first, end in runs]
        with self.opened() as file:
            spans = read_ahead.spans(file.pread, ranges)
            for (first_byte, end_byte), data in zip(ranges, spans, strict=True):
                if len(data) != end_byte - first_byte:
                    raise self.changed_error()
                yield np.frombuffer(data, np.uint8).reshape(-1, size)


def block_rows(row_bytes: int, batch_rows: int) -> int:
    """Return the number of rows of a block: whole batches of `batch_rows` rows."""
    return max(1, BLOCK_BYTES // (batch_rows * row_bytes)) * batch_rows


def _is_cached(descriptor: int, offset: int) -> bool:
    """Return whether the byte at `offset` of a file can be read without its disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # the latter where the system cannot say
        return False
