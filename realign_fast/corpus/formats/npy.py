"""One shard: a `.npy` file of rows, its header checked before its data are touched; its writer.

Other formats (`formats.py`) begin here: a format whose rows lie in one piece of the file is a
`Shard` with another header; every writer is a `ShardWriter` with another beginning and end.

A shard is an `[N, D]` array of little-endian float16, float32 or float64 in C order. No pickle is
ever loaded. What is wrong with a file is one error that names it: `TypeError` (dtype), `OSError`,
`ValueError`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...storage.paths import AnyPath, OpenedFile, StoragePath, explained, output_path, storage_path
from ..io_extension import start_writing

HEADER_BYTES = 8192  # no more of a header is ever read; numpy writes 128
MAX_COLUMNS = 1 << 24
START_BYTES = 8 << 20  # written before the disk is set to work on them


@dataclass(frozen=True)
class BFloat16:
    """The type that numpy lacks: stands where the `np.dtype` of a shard stands."""

    itemsize = 2

    def __str__(self) -> str:
        return "bfloat16"


FLOATS = {np.dtype(f"<f{n}"): getattr(torch, f"float{8 * n}") for n in (2, 4, 8)}
TORCH_DTYPES = FLOATS | {BFloat16(): torch.bfloat16}  # the last in safetensors alone


@dataclass(frozen=True)
class Shard:
    """One `.npy` file of `[rows, dimension]`: its header is checked, its data untouched."""

    path: StoragePath
    num_rows: int
    dimension: int
    dtype: np.dtype | BFloat16
    offset: int  # bytes before the first row
    row_bytes = property(lambda self: self.dimension * self.dtype.itemsize)
    file_bytes = property(lambda self: self.offset + self.num_rows * self.row_bytes)
    format = "npy"
    others = None  # no other columns

    def parse(self, file: OpenedFile) -> Shard:
        """This shard as its file says now."""
        return _parse(file, self.path)

    def writer(self, path: AnyPath) -> ShardWriter:
        """For as many rows of the same kind, in the same format."""
        return ShardWriter(path, self.num_rows, self.dimension, TORCH_DTYPES[self.dtype])


class ShardWriter:
    """Write one shard in pieces: `with ShardWriter(path, num_rows, dimension, dtype) as writer:`.

    `path` appears whole or not at all: rows go to `.<name>.partial` beside it (never a shard; what
    a dead run left is replaced), and a clean exit checks their number, syncs, renames and syncs
    the directory. An exception removes it. Of two writers the later one wins; the other fails.
    Rows for a URL go to a scratch file of this machine, which a clean exit uploads.
    A subclass for another format overrides `suffix`, `_begin`, `_append` and `_finish`.
    """

    suffix = ".npy"
    dtypes = tuple(FLOATS.values())  # that the format has

    def __init__(
        self,
        path: AnyPath,
        num_rows: int,
        dimension: int,
        dtype: torch.dtype,
        source: Any = None,  # in other formats: the shard whose other columns are kept
        others: Iterator[dict[str, Any]] | None = None,  # or those columns, row by row
    ) -> None:
        self.path, self.num_rows = output_path(path), num_rows
        self.dimension, self.dtype = dimension, dtype
        self._source, self._others = source, others
        self.written = self._started = 0  # rows; bytes that are on their way to the disk
        if dtype not in self.dtypes:
            names = ", ".join(str(one).removeprefix("torch.") for one in self.dtypes)
            want = f"expected one of {names} (bfloat16 only in safetensors); convert rows"
            raise TypeError(f"{path}: got {dtype}, {want}")
        if num_rows < 0 or not 0 < dimension < MAX_COLUMNS or not self._named():
            want = f"expected rows >= 0, columns >= 1 and a visible name in {self.suffix}"
            raise ValueError(f"{path}: got [{num_rows}, {dimension}], {want}")

    def __enter__(self) -> ShardWriter:
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._pending = self.path.pending_file(buffering=0)
            self._file = self._pending.file
            try:
                self._begin()
            except BaseException:
                self._pending.discard()
                raise
        return self

    def write(self, rows: torch.Tensor) -> None:
        """Append `[n, D]` rows of the shard's dtype; contiguous rows on the CPU are not copied."""
        known = rows.dtype == self.dtype and rows.ndim == 2 and rows.shape[1] == self.dimension
        if not known or self.written + len(rows) > self.num_rows:
            got = f"got {list(rows.shape)} {rows.dtype} after {self.written} rows"
            want = f"expected [n, {self.dimension}] {self.dtype}, {self.num_rows} rows in all"
            raise ValueError(f"{self.path}: {got}, {want}; convert or slice before writing")
        with explained(self.path):
            self._append(as_numpy(rows.detach().cpu().contiguous()))
            if (end := self._file.tell()) >= self._started + START_BYTES:
                start_writing(self._file.fileno(), self._started, end - self._started)
                self._started = end
        self.written += len(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = kind is None and self.written == self.num_rows
        with explained(self.path):
            if whole:
                with self._pending:
                    self._finish()
            else:
                try:
                    self._abandon()
                finally:
                    self._pending.discard()
        if kind is None and not whole:
            want = f"expected {self.num_rows}; nothing was kept"
            raise ValueError(f"{self.path}: got {self.written} rows, {want}")

    def _named(self) -> bool:
        return self.path.name.lower().endswith(self.suffix) and not self.path.name.startswith(".")

    def _begin(self) -> None:
        header = {"descr": torch.empty(0, dtype=self.dtype).numpy().dtype.str}
        header |= {"fortran_order": False, "shape": (int(self.num_rows), int(self.dimension))}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _append(self, rows: np.ndarray) -> None:
        self._put(rows.reshape(-1).view(np.uint8))

    def _finish(self) -> None:
        """After the last row, before the file is synced."""

    def _abandon(self) -> None:
        """Instead of `_finish`, before the file is removed."""

    def _put(self, data: np.ndarray | memoryview | bytes) -> None:
        """All of the bytes: a raw file may take fewer at a time."""
        data = memoryview(data)
        while len(data):
            data = data[self._file.write(data) :]


def as_numpy(rows: torch.Tensor) -> np.ndarray:
    """Rows as numpy sees them: its view of bfloat16 is uint16, their bits."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def read_header(path: AnyPath) -> Shard:
    """The shard at `path`; every error that one file can have is raised here."""
    with opened(storage_path(path)) as (_, shard):
        return shard


@contextmanager
def opened(
    path: StoragePath,
    expected: Shard | None = None,
    parse: Callable[[OpenedFile, StoragePath], Shard] | None = None,
) -> Iterator[tuple[OpenedFile, Shard]]:
    """The file of a shard, its header read by `parse`, found as `expected`."""
    with path.opened() as file:
        shard = expected.parse(file) if expected else (parse or _parse)(file, path)
        if expected not in (None, shard):
            raise changed(expected)
        yield file, shard


def _parse(file: OpenedFile, path: StoragePath) -> Shard:
    head = io.BytesIO(file.pread(HEADER_BYTES, 0))
    try:
        major, _ = np.lib.format.read_magic(head)
        one, two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        parse = {1: one, 2: two, 3: two}[major]  # 3 is 2 with other field names; fields are refused
        shape, fortran_order, dtype = parse(head)
    except Exception as error:  # hostile text makes the parser raise RecursionError, TypeError...
        raise ValueError(f"{path}: not a .npy file ({error}); write it with numpy.save") from error
    if dtype not in FLOATS:
        want = "expected <f2, <f4 or <f8; save array.astype('<f4')"
        why = "objects are pickles and never loaded, npy has no bfloat16 (safetensors has)"
        raise TypeError(f"{path}: dtype is {dtype.str}, {want} ({why})")
    if len(shape) != 2 or shape[0] < 0 or not 0 < shape[1] < MAX_COLUMNS:
        raise ValueError(f"{path}: shape is {shape}, expected [rows, columns]; reshape and save it")
    if fortran_order:
        raise ValueError(f"{path}: Fortran order, expected C; save numpy.ascontiguousarray(array)")
    shard = Shard(path, int(shape[0]), int(shape[1]), dtype, head.tell())
    if shard.offset % dtype.itemsize:
        raise ValueError(f"{path}: data at byte {shard.offset} is not aligned; save it with numpy")
    size = file.size
    if size != shard.file_bytes:
        what = "truncated" if size < shard.file_bytes else "longer than its header says"
        want = f"expected {shard.file_bytes} for {list(shape)} {dtype}"
        raise ValueError(f"{path}: {what}: got {size} bytes, {want}; write it again")
    return shard


def changed(shard: Shard) -> ValueError:
    return ValueError(f"{shard.path}: changed while it was read; let its writer finish, open again")
