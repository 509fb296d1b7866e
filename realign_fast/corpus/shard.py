"""A shard: one file of embedding rows, whatever its format; the bases of readers and writers.

Opening a shard reads headers only; an error names the file and is a `TypeError` (number type), an
`OSError` or a `ValueError`. Most formats decode the rows in `pieces`. Where they lie in one piece
of the file (npy, safetensors), the native reader (`csrc/io`) maps blocks of it, so rows are never
copied, and its thread brings their pages in ahead. Ranges are read where the file is remote, its
rows are not aligned to their number type, or nothing is compiled; batches are the same either way.
A file that becomes shorter is an error; in a mapped window this takes
`io_extension.survive_lost_pages`.
"""

from __future__ import annotations

import errno
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch

from ..storage import read_ahead
from ..storage.paths import AnyPath, OpenedFile, Stamp, StoragePath, explained, output_path
from . import io_extension

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_COLUMNS = 1 << 24
BLOCK_BYTES = 16 << 20  # more only where one batch is larger
BLOCKS_AHEAD = 6  # with 2, reading and writing at once reaches a third of the rate
THREADS = 1  # each brings in a whole block; two compete for the disk's read-ahead
TAKEN_BYTES = 1 << 20  # that are decoded at a time to take rows out of them
GAP_BYTES = 32 << 10  # between wanted rows: fewer bytes cost less to fetch than another request
START_BYTES = 8 << 20  # written before the disk is told to start on them
# Bytes of one write: the page cache holds larger ones in blocks of 2 MiB, and a virtual machine has
# given free blocks of that size back to its host, so that their first touch is slow.
WRITE_BYTES = 1 << 20


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


@dataclass(frozen=True)
class Shard(ABC):
    """One file of rows `[num_rows, dimension]`."""

    format: ClassVar[str]  # a key of `format_registry.FORMATS`
    writer_class: ClassVar[type[FormatWriter]]
    path: StoragePath
    num_rows: int
    dimension: int
    dtype: Any  # a `Dtype`
    column: str  # name of the rows: a column, a key, the ending of a member's name; "" without
    stamp: Stamp  # of the file when it was opened

    @property
    def has_other_columns(self) -> bool:
        """True if `other_columns` yields some."""
        return next(self.other_columns(), None) is not None

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.dimension * int(self.dtype.itemsize)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Number type of the rows."""
        return TORCH_DTYPES[self.dtype]

    @abstractmethod
    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield all rows from `first` on, `[n, D]` at a time or as their bytes `[n, row_bytes]`.

        `batch_rows` is a good size. A writable piece is given away: a batch may be a view of it.
        """

    def read(self, first: int, batch_rows: int) -> Batches:
        """Yield `(row number, rows [n, D])` from row `first` on.

        Batches end at multiples of `batch_rows`. Whatever is wrong with a file that no longer has
        its `stamp` is that it has changed.
        """
        self.check_unchanged()
        with self.noticing_changes():
            yield from self._batches_of(self.pieces(first, batch_rows), first, batch_rows)
        self.check_unchanged()

    @contextmanager
    def noticing_changes(self) -> Iterator[None]:
        """Raise the error of a changed file in place of one that its other content causes."""
        try:
            yield
        except (OSError, ValueError, IndexError) as error:
            if self.path.exists() and self.path.stamp() != self.stamp:
                raise self.changed_error() from error
            raise

    def _batches_of(self, pieces: Iterator[np.ndarray], first: int, batch_rows: int) -> Batches:
        """Cut pieces into batches; a batch is a view of a writable piece that holds all of it."""
        row, filled, batch = first, 0, np.empty(0)
        for piece in pieces:
            while len(piece):
                count = min(batch_rows - row % batch_rows, self.num_rows - row)
                if not count:
                    raise self.changed_error()
                if not filled and piece.flags.writeable and len(piece) >= count:
                    yield row, torch.from_numpy(piece[:count]).view(self.torch_dtype)
                    piece, row = piece[count:], row + count
                    continue
                if not filled:
                    batch = np.empty((count, piece.shape[1]), piece.dtype)
                part = piece[: count - filled]
                batch[filled : filled + len(part)] = part
                piece, filled = piece[len(part) :], filled + len(part)
                if filled == count:
                    yield row, torch.from_numpy(batch).view(self.torch_dtype)
                    row, filled, batch = row + count, 0, np.empty(0)
        if row != self.num_rows:
            raise self.changed_error()

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes `[len(ids), row_bytes]` of the rows at sorted `ids`.

        All rows between the first and the last are decoded.
        """
        taken, first = np.empty((len(ids), self.row_bytes), np.uint8), int(ids[0])
        self.check_unchanged()
        with self.noticing_changes():
            step = max(1, TAKEN_BYTES // self.row_bytes)
            self.copy_selected(self.pieces(first, step), first, ids, taken)
        self.check_unchanged()
        return taken

    def copy_selected(
        self, pieces: Iterator[np.ndarray], first: int, ids: np.ndarray, taken: np.ndarray
    ) -> None:
        """Copy the bytes of the rows at sorted `ids` out of pieces, which begin at row `first`."""
        for rows in pieces:
            low, high = np.searchsorted(ids, [first, first + len(rows)])
            taken[low:high] = rows.view(np.uint8)[ids[low:high] - first]
            first += len(rows)
            if high == len(ids):
                return
        raise self.changed_error()

    def rows_read(self, ids: np.ndarray) -> int:
        """Return how many rows `take` reads at most to return those at sorted `ids`."""
        return int(ids[-1]) + 1

    def writer(self, path: AnyPath) -> FormatWriter:
        """Return a writer for other rows of the same shape, which keeps all else of this file."""
        shape = self.num_rows, self.dimension, self.torch_dtype
        return self.writer_class(path, *shape, source=self)

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the columns other than the rows, as an entry for each row.

        A format may leave out the columns that are not `selected` by `only`.
        """
        return iter(())

    def filled(
        self, first: int, end: int, batch_rows: int, fill: Callable[[int, np.ndarray], object]
    ) -> Iterator[np.ndarray]:
        """Yield the rows `first..end` in batches, each of which `fill(first row, batch)` fills."""
        while first < end:
            count = min(batch_rows - first % batch_rows, end - first)
            rows = np.empty((count, self.dimension), self.dtype)
            fill(first, rows)
            first += count
            yield rows

    def check_unchanged(self) -> None:
        """Raise an error unless the file has the stamp that it had when it was opened."""
        if self.path.stamp() != self.stamp:
            raise self.changed_error()

    def changed_error(self) -> ValueError:
        """Return the error for a file that is no longer what it was when it was opened."""
        return ValueError(f"{self.path}: changed while it was read; open it when it is written")


@dataclass(frozen=True)
class ContiguousShard(Shard):
    """A shard whose rows lie in one piece of the file, as numbers in C order."""

    offset: int  # bytes before the first row

    @contextmanager
    def opened(self) -> Iterator[OpenedFile]:
        """Open the file; an error if it has changed."""
        with self.path.opened() as file:
            if file.stamp() != self.stamp:
                raise self.changed_error()
            yield file

    def read(self, first: int, batch_rows: int) -> Batches:
        """Yield views of the mapped file, or of ranges that were read; see `Shard.read`."""
        is_aligned = self.offset % self.dtype.itemsize == 0
        if self.path.is_remote or not (io_extension.io and is_aligned):
            return super().read(first, batch_rows)
        return self._read_blocks(first, batch_rows)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows at sorted `ids`; near ones at a URL share a request."""
        taken = np.empty((len(ids), self.row_bytes), np.uint8)
        if not self.path.is_remote:
            with self.opened() as file:
                for row, target in zip(ids.tolist(), taken, strict=True):
                    offset = self.offset + row * self.row_bytes
                    if os.preadv(file.fileno(), [target.data], offset) != self.row_bytes:
                        raise self.changed_error()
            return taken
        most = max(1, read_ahead.PIECE_BYTES // self.row_bytes)
        is_apart = (np.diff(ids) > 1 + GAP_BYTES // self.row_bytes) | (np.diff(ids // most) > 0)
        parts = np.split(np.arange(len(ids)), np.flatnonzero(is_apart) + 1)
        runs = [(int(ids[part[0]]), int(ids[part[-1]]) + 1) for part in parts]
        for part, (first, _), rows in zip(parts, runs, self._ranges(runs), strict=True):
            taken[part] = rows[ids[part] - first]
        return taken

    def rows_read(self, ids: np.ndarray) -> int:
        """Return the number of rows, which are read alone; see `Shard.rows_read`."""
        return len(ids)

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield the bytes of ranges that are read ahead; see `Shard.pieces`."""
        step = max(1, read_ahead.PIECE_BYTES // self.row_bytes)
        starts = range(first, self.num_rows, step)
        return self._ranges([(row, min(row + step, self.num_rows)) for row in starts])

    def _read_blocks(self, first: int, batch_rows: int) -> Batches:
        step = max(1, BLOCK_BYTES // (batch_rows * self.row_bytes)) * batch_rows
        block_first = first - first % batch_rows
        with self.opened() as file, explained(self.path):
            limits = self.offset + block_first * self.row_bytes, self.stamp[0]
            options: dict[str, Any] = {"ahead": BLOCKS_AHEAD, "threads": THREADS}
            blocks_of = io_extension.io.ShardReader
            reader = blocks_of(file.fileno(), *limits, step * self.row_bytes, **options)
            for start in range(block_first, self.num_rows, step):
                try:
                    block = next(reader)
                except EOFError as error:
                    raise self.changed_error() from error
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
        if block.lost or file.stamp()[0] != self.stamp[0]:
            for row in range(self.num_rows if block.lost else 0):  # has the disk failed?
                file.pread(self.row_bytes, self.offset + row * self.row_bytes)
            raise self.changed_error()

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


class FormatWriter:
    """Write one shard in pieces: `with writer: writer.write(rows)`, as often as needed.

    A clean exit checks the number of rows, syncs the file, and gives it its name or uploads it; an
    exception removes it. Of two writers of one path the later one wins, and the other fails. A
    format implements `_begin` and, where rows are not just their bytes, `_append` and `_finish`.

    Args:
        path: the shard, with one of `suffixes`.
        num_rows: rows that will be written in all.
        dimension: numbers in a row.
        dtype: one of `dtypes`.
        source: the shard of the same format whose other columns are kept; for tables the columns.
        other_columns: those columns instead, as one dictionary a row.
    Raises:
        TypeError: the format does not have the number type.
        ValueError: the shape or the name of the file is not one of a shard.
        OSError: the file cannot be written.
    """

    suffixes: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = tuple(FLOATS.values())
    accepts_entries: ClassVar[bool] = False  # whether it uses `other_columns`

    def __init__(
        self,
        path: AnyPath,
        num_rows: int,
        dimension: int,
        dtype: torch.dtype,
        source: Any = None,
        other_columns: Iterator[dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.num_rows = output_path(path), num_rows
        self.dimension, self.dtype = dimension, dtype
        self._source, self._other_columns = source, other_columns
        self.written = 0  # rows
        self._started = 0  # bytes that the disk has been told to write
        if dtype not in self.dtypes:
            names = ", ".join(str(name).removeprefix("torch.") for name in self.dtypes)
            expected = f"expected one of {names} (bfloat16 only in safetensors and pt)"
            raise TypeError(f"{self.path}: got {dtype}, {expected}; convert the rows")
        name = self.path.name
        is_shard_name = name.lower().endswith(self.suffixes) and not name.startswith(".")
        if num_rows < 0 or not 0 < dimension < MAX_COLUMNS or not is_shard_name:
            suffixes = " or ".join(self.suffixes)
            expected = f"expected rows >= 0, columns >= 1 and a visible name in {suffixes}"
            raise ValueError(f"{self.path}: got [{num_rows}, {dimension}], {expected}")

    def __enter__(self) -> Self:
        with explained(self.path), ExitStack() as stack:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(self.path.pending_file(buffering=0))
            self._buffered = io.BufferedWriter(self._file, 1 << 20)
            self._begin()
            self._pending = stack.pop_all()
        return self

    def write(self, rows: torch.Tensor) -> None:
        """Append rows `[n, D]` of the shard's number type; contiguous CPU rows are not copied."""
        fits = rows.dtype == self.dtype and rows.ndim == 2 and rows.shape[1] == self.dimension
        if not fits or self.written + len(rows) > self.num_rows:
            actual = f"got {list(rows.shape)} {rows.dtype} after {self.written} rows"
            expected = f"expected [n, {self.dimension}] {self.dtype}, {self.num_rows} rows in all"
            raise ValueError(f"{self.path}: {actual}, {expected}; convert or slice before writing")
        with explained(self.path):
            self._append(as_numpy(rows.detach().cpu().contiguous()))
            if io_extension.io and (size := self._file.tell() - self._started) >= START_BYTES:
                io_extension.io.start_writing(self._file.fileno(), self._started, size)
                self._started += size
        self.written += len(rows)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None and self.written == self.num_rows:
            with explained(self.path), self._pending:
                self._finish()
                self._buffered.flush()
            return
        with self._pending:
            self._abandon()
            counts = f"got {self.written} rows, expected {self.num_rows}"
            raise error or ValueError(f"{self.path}: {counts}; nothing was kept")

    def _begin(self) -> None:
        """Write what stands before the rows to `self._file`, unbuffered, or to `self._buffered`."""

    def _append(self, rows: np.ndarray) -> None:
        """Write rows `[n, D]` as they lie in memory; `self.written` rows stand before them."""
        self._put(rows.reshape(-1).view(np.uint8))

    def _finish(self) -> None:
        """Write what stands behind the rows, before the file is synced."""

    def _abandon(self) -> None:
        """Release what `_begin` made; called instead of `_finish`."""

    def _put(self, data: Any) -> None:
        """Write all bytes of `data` (a buffer): an unbuffered file may take fewer at a time."""
        view = memoryview(data)
        while len(view):
            try:
                view = view[self._file.write(view[:WRITE_BYTES]) :]
            except OSError as error:
                if error.errno != errno.EFAULT or not io_extension.survives_lost_pages:
                    raise
                bytes(view[:1])  # a page of the source is lost: this makes it zeros, and its
                # reader reports it before the file is complete


def absolute(path: StoragePath) -> str:
    """Return the path for the key of a cache, which must not follow the working directory."""
    return os.path.abspath(str(path))


def selected(names: Iterable[str], only: Collection[str]) -> list[str]:
    """Return the names that are among `only`; all of them if none is."""
    names = list(names)
    return [name for name in names if name in only] or names


def check_size(path: StoragePath, size: int, expected: int) -> None:
    """Raise an error unless a file has the size in bytes that its header says."""
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ValueError(f"{path}: {state}: got {size} bytes, expected {expected}; write it again")


def as_numpy(rows: torch.Tensor) -> np.ndarray:
    """Return rows as a numpy view; bfloat16, which numpy lacks, as uint16 of the same bits."""
    rows = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    return rows.numpy()
