"""A shard: one file of embedding rows, whatever its format, and the number types of its rows.

Every format derives from one of two classes. A `ContiguousShard` (npy, safetensors) holds its rows
in one piece of the file, so they are mapped. A `StreamedShard` (`streamed_shard.py`) decodes them.
Opening a shard reads headers only; an error names the file and is a `TypeError` (number type),
an `OSError` or a `ValueError`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch

from ..storage.paths import AnyPath, OpenedFile, StoragePath
from . import mapped_reader, remote

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
        return False

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.dimension * self.dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Number type of the rows."""
        return TORCH_DTYPES[self.dtype]

    @abstractmethod
    def read(
        self, first: int, batch_rows: int, ring: Any = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
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

    def other_columns(self) -> Iterator[ColumnChunk]:
        """Yield the columns other than the rows, in order and many rows at a time."""
        return iter(())

    def rebatched(
        self, pieces: Iterator[np.ndarray], first: int, batch_rows: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Cut pieces `[n, any]`, which are all rows from `first` on, into the batches of `read`.

        A batch is a view of a writable piece where that holds all of it. A `ValueError` says that
        the pieces do not end with the last row.
        """
        row, filled, batch = first, 0, None
        for piece in pieces:
            while len(piece):
                if row == self.num_rows:
                    raise self.changed_error()
                if batch is None:
                    count = min(row - row % batch_rows + batch_rows, self.num_rows) - row
                    if piece.flags.writeable and len(piece) >= count:
                        yield row, torch.from_numpy(piece[:count])
                        piece, row = piece[count:], row + count
                        continue
                    batch = np.empty((count, piece.shape[1]), piece.dtype)
                part = piece[: len(batch) - filled]
                batch[filled : filled + len(part)] = part
                piece, filled = piece[len(part) :], filled + len(part)
                if filled == len(batch):
                    yield row, torch.from_numpy(batch)
                    row, filled, batch = row + filled, 0, None
        if row != self.num_rows:
            raise self.changed_error()

    def changed_error(self) -> ValueError:
        """Return the error for a file that is no longer what it was when it was opened."""
        advice = "let its writer finish, open again"
        return ValueError(f"{self.path}: changed while it was read; {advice}")


@dataclass(frozen=True)
class ContiguousShard(Shard):
    """A shard whose rows lie in one piece of the file, as numbers in C order."""

    offset: int  # bytes before the first row

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return self.offset + self.num_rows * self.row_bytes

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

    def read(
        self, first: int, batch_rows: int, ring: Any = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield views of the mapped file, or of the pieces of a remote one that were fetched."""
        if self.path.is_remote:
            return remote.read(self, first, batch_rows)
        return mapped_reader.read(self, first, batch_rows, ring)

    def take(self, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Read the rows at sorted `ids` into `target[places]`; only they are read, or fetched."""
        take = remote.take if self.path.is_remote else mapped_reader.take
        take(self, ids, target, places)


def as_numpy(rows: torch.Tensor) -> np.ndarray:
    """Return rows as a numpy view; bfloat16, which numpy lacks, as uint16 of the same bits."""
    rows = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    return rows.numpy()
