"""A shard: one file of embedding rows, whatever its format, and the number types of its rows.

Most formats derive from one of two classes. A `ContiguousShard` (npy, safetensors) holds its rows
in one piece of the file. The rows of a `StreamedShard` are decoded. Opening a shard reads headers
only; an error names the file and is a `TypeError` (number type), an `OSError` or a `ValueError`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch

from ..storage.paths import AnyPath, Stamp, StoragePath
from .io_extension import io as _io

if TYPE_CHECKING:
    from .shard_writer import FormatWriter

MAX_COLUMNS = 1 << 24


@dataclass(frozen=True)
class BFloat16:
    """The number type that numpy lacks, in place of the `np.dtype` of a shard."""

    itemsize = 2
    name = "bfloat16"

    def __str__(self) -> str:
        return self.name


Dtype: TypeAlias = "np.dtype[Any] | BFloat16"
FLOATS: dict[Dtype, torch.dtype] = {
    np.dtype(f"<f{size}"): getattr(torch, f"float{8 * size}") for size in (2, 4, 8)
}
TORCH_DTYPES = FLOATS | {BFloat16(): torch.bfloat16}  # the last in safetensors alone

Batches: TypeAlias = Iterator[tuple[int, torch.Tensor]]  # row number, rows [n, D]
# Columns other than the rows, as a format yields them: entries, arrays, or a `pa.RecordBatch`.
ColumnChunk: TypeAlias = "list[dict[str, Any]] | dict[str, np.ndarray] | Any"


@dataclass(frozen=True)
class Shard(ABC):
    """One file of rows `[num_rows, dimension]`."""

    writer_class: ClassVar[type[FormatWriter]]
    path: StoragePath
    num_rows: int
    dimension: int
    dtype: Dtype

    @property
    @abstractmethod
    def format(self) -> str:
        """A key of `format_registry.FORMATS`, or "arrow-stream"."""

    @property
    def has_other_columns(self) -> bool:
        """True if `other_columns` yields some."""
        return next(self.other_columns(), None) is not None

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.dimension * self.dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Number type of the rows."""
        return TORCH_DTYPES[self.dtype]

    @abstractmethod
    def read(self, first: int, batch_rows: int, ring: Any = None) -> Batches:
        """Yield `(row number, rows [n, D])` from row `first` on.

        Batches end at multiples of `batch_rows`. Rows of a local contiguous shard lie in the
        buffers of `ring`, if one is given.
        """

    @abstractmethod
    def take(self, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Read the rows at the sorted numbers `ids` into the bytes `target[places]`, one a row."""

    def writer(self, path: AnyPath) -> FormatWriter:
        """Return a writer for other rows of the same shape, which keeps all else of this file."""
        shape = self.num_rows, self.dimension, self.torch_dtype
        return self.writer_class(path, *shape, source=self)

    def other_columns(self, only: Collection[str] = ()) -> Iterator[ColumnChunk]:
        """Yield the columns other than the rows, in order and many rows at a time.

        A format may leave out the columns that are not `selected` by `only`.
        """
        return iter(())

    def rebatched(
        self, pieces: Iterator[np.ndarray], first: int, batch_rows: int, stamp: Stamp
    ) -> Batches:
        """Cut pieces `[n, any]`, which are all rows from `first` on, into the batches of `read`.

        A batch is a view of a writable piece where that holds all of it. Whatever is wrong with a
        file that no longer has the `stamp` is that it has changed.
        """
        try:
            yield from self._batches_of(pieces, first, batch_rows)
        except (OSError, ValueError) as error:
            if self.path.exists() and self.path.stamp() != stamp:
                raise self.changed_error() from error
            raise
        if self.path.is_remote and self.path.stamp() != stamp:
            raise self.changed_error()

    def _batches_of(self, pieces: Iterator[np.ndarray], first: int, batch_rows: int) -> Batches:
        row, filled, batch = first, 0, np.empty(0)
        for piece in pieces:
            while len(piece):
                count = min(batch_rows - row % batch_rows, self.num_rows - row)
                if not count:
                    raise self.changed_error()
                if not filled and piece.flags.writeable and len(piece) >= count:
                    yield row, torch.from_numpy(piece[:count])
                    piece, row = piece[count:], row + count
                    continue
                if not filled:
                    batch = np.empty((count, piece.shape[1]), piece.dtype)
                part = piece[: count - filled]
                batch[filled : filled + len(part)] = part
                piece, filled = piece[len(part) :], filled + len(part)
                if filled == count:
                    yield row, torch.from_numpy(batch)
                    row, filled, batch = row + count, 0, np.empty(0)
        if row != self.num_rows:
            raise self.changed_error()

    def changed_error(self) -> ValueError:
        """Return the error for a file that is no longer what it was when it was opened."""
        return ValueError(f"{self.path}: changed while it was read; open it when it is written")


@dataclass(frozen=True)
class StreamedShard(Shard):
    """A shard of a format that is read from its start on; a subclass decodes it in `pieces`."""

    dtype: np.dtype[Any]
    column: str  # name of the rows: a column, a key, the ending of a member's name
    stamp: Stamp  # of the file when it was opened

    @abstractmethod
    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield all rows from `first` on, `[n, D]` at a time; `batch_rows` is a good size.

        A writable piece is given away: a batch may be a view of it.
        """

    def read(self, first: int, batch_rows: int, ring: Any = None) -> Batches:
        """Yield `(row number, rows [n, D])` from row `first` on; see `Shard.read`."""
        if self.path.stamp() != self.stamp:
            raise self.changed_error()
        yield from self.rebatched(self.pieces(first, batch_rows), first, batch_rows, self.stamp)

    def checked(self, place: str, row: np.ndarray) -> np.ndarray:
        """Return a row `[D]` that is like the first one."""
        if (row.size, row.dtype) != (self.dimension, self.dtype):
            expected = f"{self.dimension} of {self.dtype} as in the first row"
            raise ValueError(f"{place} holds {row.size} of {row.dtype}, expected {expected}")
        return row.reshape(-1)

    def empty_rows(self, count: int, batch_rows: int) -> np.ndarray:
        """Return memory for rows `[count, D]` of a batch, used again once a batch is released."""
        if not _io:
            return np.empty((count, self.dimension), self.dtype)
        memory = _ring(min(batch_rows, self.num_rows) * self.row_bytes).take()
        return np.frombuffer(memory, self.dtype, count * self.dimension).reshape(count, -1)

    def take(self, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Read the rows at sorted `ids` into the bytes `target[places]`."""
        target[places] = self.take_rows(ids).view(np.uint8)

    def take_rows(self, ids: np.ndarray) -> np.ndarray:
        """Read the rows `[len(ids), D]` at sorted `ids`; all between first and last are decoded."""
        taken = np.empty((len(ids), self.dimension), self.dtype)
        batch_rows = max(1, (1 << 20) // self.row_bytes)
        for first, rows in self.read(int(ids[0]), batch_rows):
            low, high = np.searchsorted(ids, [first, first + len(rows)])
            taken[low:high] = rows.numpy()[ids[low:high] - first]
            if high == len(ids):
                break
        if self.path.stamp() != self.stamp:  # `read` was left before its end, where it looks
            raise self.changed_error()
        return taken


@lru_cache(maxsize=1)  # kept for the next shard and pass: new memory takes as long as copying
def _ring(size: int) -> Any:
    return _io.Ring(2, size)  # one is looked at while the next is filled


def absolute(path: StoragePath) -> str:
    """Return the path for the key of a cache, which must not follow the working directory."""
    return os.path.abspath(str(path))


def selected(names: Iterable[str], only: Collection[str]) -> list[str]:
    """Return the names that are among `only`; all of them if none is."""
    names = list(names)
    return [name for name in names if name in only] or names


def check_vector(place: str, array: np.ndarray) -> None:
    """Raise an error unless an array is a row `[D]` or `[1, D]`."""
    if array.dtype not in FLOATS:
        expected = "expected float16, float32 or float64; save array.astype('<f4')"
        raise TypeError(f"{place} holds {array.dtype}, {expected}")
    if array.shape not in ((array.size,), (1, array.size)) or not 0 < array.size < MAX_COLUMNS:
        raise ValueError(f"{place} has shape {array.shape}, expected [D] or [1, D]; reshape it")


def check_size(path: StoragePath, size: int, expected: int) -> None:
    """Raise an error unless a file has the size in bytes that its header says."""
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ValueError(f"{path}: {state}: got {size} bytes, expected {expected}; write it again")


def as_numpy(rows: torch.Tensor) -> np.ndarray:
    """Return rows as a numpy view; bfloat16, which numpy lacks, as uint16 of the same bits."""
    rows = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    return rows.numpy()
