"""The base of every writer of shards: the file appears under its name whole or not at all."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..storage.paths import AnyPath, explained, output_path
from .io_extension import io as _io
from .io_extension import survives_lost_pages
from .shard import FLOATS, MAX_COLUMNS, as_numpy

if TYPE_CHECKING:
    from typing_extensions import Self

START_BYTES = 8 << 20  # written before the disk is told to start on them
# Bytes of one write: the page cache holds larger ones in blocks of 2 MiB, and a virtual machine has
# given free blocks of that size back to its host, so that their first touch is slow.
WRITE_BYTES = 1 << 20


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
            if _io and (end := self._file.tell()) >= self._started + START_BYTES:
                _io.start_writing(self._file.fileno(), self._started, end - self._started)
                self._started = end
        self.written += len(rows)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        with explained(self.path):
            if error is None and self.written == self.num_rows:
                with self._pending:
                    self._finish()
                    self._buffered.flush()
                return
            counts = f"got {self.written} rows, expected {self.num_rows}"
            error = error or ValueError(f"{self.path}: {counts}; nothing was kept")
            try:
                self._abandon()
            finally:
                self._pending.__exit__(type(error), error, error.__traceback__)
        if error_type is None:
            raise error

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
                if error.errno != errno.EFAULT or not survives_lost_pages():
                    raise
                bytes(view[:1])  # a page of the source is lost: this makes it zeros, and its
                # reader reports it before the file is complete
