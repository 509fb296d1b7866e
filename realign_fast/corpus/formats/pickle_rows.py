"""Rows straight out of a pickled list's file, and straight into a copy of it.

Arrays and floats lie in a pickle as the bytes they are. `csrc/io/pickle/pickle_interpreter.cpp`
runs a file as `unpickle.py` does, builds nothing, and remembers where each row lies (4 bytes a
row): a pass copies the rows out of the file. An aligned file is the same bytes with other numbers
in their places, so all that is beside the rows is kept as it is. What is unusual (rows of several
kinds, big-endian numbers, bytes that two values share, text as bytes of protocol 2) is left to
`unpickle.py`, and so is a file that is not plain data: it says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, Stamp, StoragePath, explained
from ..io_extension import io as _io
from ..streamed_shard import Buffers, StreamedShard, torch_dtype
from . import pickle_interpreter
from .npy import ShardWriter, changed

FILES = 256  # whose rows are remembered


def direct_rows(path: StoragePath, stamp: Stamp, names: Sequence[str]) -> Any:
    """`_io.PickledRows` of the rows under the first of `names` that row 0 has; None: unusual."""
    keys = tuple(name.encode(errors="surrogatepass") for name in names)
    return _looked_through(path, stamp, keys, pickle_interpreter.MAX_STEPS) if _io else None


@lru_cache(maxsize=FILES)
def _looked_through(
    path: StoragePath, stamp: Stamp, names: tuple[bytes, ...], most_steps: int
) -> Any:
    with _opened(path, stamp) as descriptor:
        try:
            return _io.PickledRows(descriptor, stamp[0], names, most_steps)
        except _io.NotPlain:
            return None


def read_direct(shard: StreamedShard, rows: Any, first: int, size: int) -> Iterator[np.ndarray]:
    """`StreamedShard.pieces` through `rows`, which are those of the shard."""
    buffers = Buffers(shard, size)
    with _opened(shard.path, shard.stamp) as descriptor:
        while first < shard.num_rows:
            piece = buffers.empty(min(size - first % size, shard.num_rows - first))
            _read(shard, rows, descriptor, first, piece)
            first += len(piece)
            yield piece
            del piece  # or its memory would be kept from the next batch


def take_direct(shard: StreamedShard, rows: Any, ids: np.ndarray) -> np.ndarray:
    """Rows at `ids`, `[n, D]`: only they are read."""
    out = np.empty((len(ids), shard.dimension), shard.dtype)
    with _opened(shard.path, shard.stamp) as descriptor:
        for place, row in enumerate(ids):
            _read(shard, rows, descriptor, int(row), out[place])
    return out


class PickleCopy(ShardWriter):
    """`ShardWriter` for a copy of a pickled file in which only the numbers of rows are others."""

    suffix = (".pkl", ".pickle")

    def __init__(self, path: AnyPath, source: StreamedShard, rows: Any) -> None:
        super().__init__(path, source.num_rows, source.dimension, torch_dtype(source), source)
        self._rows = rows

    def _begin(self) -> None:
        """The file begins with what the source has before its first row."""

    def _append(self, rows: np.ndarray) -> None:
        if len(rows):
            self._copy(self.written, rows)

    def _finish(self) -> None:
        self._copy(self.num_rows, np.empty(0, self._source.dtype))

    def _copy(self, first: int, rows: np.ndarray) -> None:
        with _opened(self._source.path, self._source.stamp) as descriptor:
            with _unchanged(self._source):
                self._rows.write(descriptor, first, rows, self._file.fileno())


def _read(shard: StreamedShard, rows: Any, descriptor: int, first: int, out: np.ndarray) -> None:
    with _unchanged(shard):
        rows.read(descriptor, first, out)


@contextmanager
def _unchanged(shard: StreamedShard) -> Iterator[None]:
    """What was read within is of the file that was looked through."""
    try:
        yield
    except _io.NotPlain as error:  # it is shorter than it was
        raise changed(shard) from error
    if not shard.path.is_remote and shard.path.stamp() != shard.stamp:
        raise changed(shard)


@contextmanager
def _opened(path: StoragePath, stamp: Stamp) -> Iterator[int]:
    """Yield a descriptor of the file; errors name the file."""
    with explained(path), path.descriptor(stamp) as descriptor:
        yield descriptor
