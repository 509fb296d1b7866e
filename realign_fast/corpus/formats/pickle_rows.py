"""Rows copied directly out of the file of a pickled list, and into a copy of that file.

Arrays and floats lie in a pickle as the bytes they are. `csrc/io/pickle/pickle_interpreter.cpp`
runs a file as `pickle_interpreter.py` does, builds nothing, and remembers where each row lies
(4 bytes a row), so a pass copies the rows out of the file. An aligned file is the same bytes with
other numbers in their places, so everything else in it is kept. Unusual files (rows of several
types, big-endian numbers, bytes that two values share, text as bytes of protocol 2) are left to
`pickle_interpreter.py`, and so is a file that is not plain data: it says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, Stamp, StoragePath, explained
from ..io_extension import io as _io
from ..shard_writer import FormatWriter
from ..streamed_shard import Buffers, StreamedShard
from . import pickle_interpreter

REMEMBERED_FILES = 256  # for which the places of the rows are kept


def direct_rows(path: StoragePath, stamp: Stamp, names: Sequence[str]) -> Any:
    """Return where the rows lie in a file, as `_io.PickledRows`; None if it is unusual.

    The rows are under the first of `names` that row 0 has. Their places are kept for the stamp.
    """
    keys = tuple(name.encode(errors="surrogatepass") for name in names)
    return _located(path, stamp, keys, pickle_interpreter.MAX_STEPS) if _io else None


@lru_cache(maxsize=REMEMBERED_FILES)
def _located(path: StoragePath, stamp: Stamp, names: tuple[bytes, ...], max_steps: int) -> Any:
    with _opened(path, stamp) as descriptor:
        try:
            return _io.PickledRows(descriptor, stamp[0], names, max_steps)
        except _io.NotPlain:
            return None


def read_direct(
    shard: StreamedShard, rows: Any, first: int, batch_rows: int
) -> Iterator[np.ndarray]:
    """Yield the rows from `first` on through `rows`, their places; see `StreamedShard.pieces`."""
    buffers = Buffers(shard, batch_rows)
    with _opened(shard.path, shard.stamp) as descriptor:
        while first < shard.num_rows:
            piece = buffers.empty(min(batch_rows - first % batch_rows, shard.num_rows - first))
            _read(shard, rows, descriptor, first, piece)
            first += len(piece)
            yield piece
            del piece  # or its memory would be kept from the next batch


def take_direct(shard: StreamedShard, rows: Any, ids: np.ndarray) -> np.ndarray:
    """Read the rows at `ids`, `[len(ids), D]`, through `rows`, their places; only they are read."""
    taken = np.empty((len(ids), shard.dimension), shard.dtype)
    with _opened(shard.path, shard.stamp) as descriptor:
        for place, row in enumerate(ids):
            _read(shard, rows, descriptor, int(row), taken[place])
    return taken


class PickleCopy(FormatWriter):
    """Write a copy of a pickled file in which only the numbers of its rows are others."""

    suffixes = (".pkl", ".pickle")

    def __init__(self, path: AnyPath, source: StreamedShard, rows: Any) -> None:
        super().__init__(path, source.num_rows, source.dimension, source.torch_dtype, source)
        self._rows = rows

    def _begin(self) -> None:
        """Write nothing: what the source has before its first row is copied with that row."""

    def _append(self, rows: np.ndarray) -> None:
        if len(rows):
            self._copy(self.written, rows)

    def _finish(self) -> None:
        self._copy(self.num_rows, np.empty(0, self._source.dtype))

    def _copy(self, first: int, rows: np.ndarray) -> None:
        with _opened(self._source.path, self._source.stamp) as descriptor:
            with _unchanged(self._source):
                self._rows.write(descriptor, first, rows, self._file.fileno())


def _read(shard: StreamedShard, rows: Any, descriptor: int, first: int, target: np.ndarray) -> None:
    with _unchanged(shard):
        rows.read(descriptor, first, target)


@contextmanager
def _unchanged(shard: StreamedShard) -> Iterator[None]:
    """Raise an error if the file is not the one whose rows were located."""
    try:
        yield
    except _io.NotPlain as error:  # it is shorter than it was
        raise shard.changed_error() from error
    if not shard.path.is_remote and shard.path.stamp() != shard.stamp:
        raise shard.changed_error()


@contextmanager
def _opened(path: StoragePath, stamp: Stamp) -> Iterator[int]:
    """Yield a descriptor of the file; errors name the file."""
    with explained(path), path.descriptor(stamp) as descriptor:
        yield descriptor
