"""Files of named arrays: `.npz` of numpy, and `.pt` of PyTorch with a tensor or a dict of them.

The rows are the entry `embedding`, or the only entry `[N, D]` of floating-point numbers. Nothing in
the files is run: numpy loads no pickles, and `torch.load` with `weights_only` knows tensors and
plain data alone. A `.pt` file is mapped. Arrays of an `.npz` file are in memory while it is read,
and all results while they are written. A result keeps the other entries.
"""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from ...storage.paths import Stamp, StoragePath, explained
from ..shard import MAX_COLUMNS, TORCH_DTYPES, FormatWriter, Shard, absolute, as_numpy, selected

DEFAULT = "embedding"
DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


class NpzWriter(FormatWriter):
    """Write an `.npz` file; of `source` it keeps the other arrays."""

    suffixes: ClassVar[tuple[str, ...]] = (".npz",)

    def _begin(self) -> None:
        self._rows = torch.empty(self.num_rows, self.dimension, dtype=self.dtype)

    def _append(self, rows: np.ndarray) -> None:
        values = torch.from_numpy(rows).view(self.dtype)
        self._rows[self.written : self.written + len(rows)] = values

    def _finish(self) -> None:
        entries = {DEFAULT: self._rows}
        if self._source:
            entries = self._source.entries | {self._source.column: self._rows}
        self._save(entries, self._buffered)

    def _save(self, entries: dict[str, Any], file: Any) -> None:
        np.savez(file, allow_pickle=False, **{name: np.asarray(entries[name]) for name in entries})


class TorchWriter(NpzWriter):
    """Write a tensor, or the dict of `source` with other rows."""

    suffixes = (".pt", ".pth")
    dtypes = tuple(DTYPES)

    def _save(self, entries: dict[str, Any], file: Any) -> None:
        alone = "" in entries or not self._source
        torch.save(self._rows if alone else entries, file)


class NpzShard(Shard):
    """One array of an `.npz` file."""

    format = "npz"
    writer_class = NpzWriter

    @property
    def entries(self) -> dict[str, Any]:
        """All entries; a tensor that is alone has the name ""."""
        self.check_unchanged()  # touching a page that is gone would be a SIGBUS
        return _kept_entries(self.path, self.stamp, absolute(self.path))

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield copies of the rows; see `Shard.pieces`."""
        starts = range(first, self.num_rows, batch_rows)
        return (self._rows(slice(row, row + batch_rows)).copy() for row in starts)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows at `ids`."""
        return self._rows(ids).view(np.uint8)

    def _rows(self, selection: Any) -> np.ndarray:
        rows: np.ndarray = as_numpy(self.entries[self.column].detach())[selection]
        return rows

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the other entries that have a value for each row; see `Shard.other_columns`."""
        entries, columns = self.entries, {}
        for name in selected((name for name in entries if name != self.column), only):
            values = entries[name]
            values = values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else values
            if isinstance(values, list) and len(values) == self.num_rows:
                columns[name] = values
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


class TorchShard(NpzShard):
    """One tensor of a `.pt` file."""

    format = "pt"
    writer_class = TorchWriter


def read_shard(path: StoragePath, column: str | None = None) -> NpzShard:
    """Open the entry `column` of a file; by default `embedding`, or the only one of rows."""
    stamp, shard_class = path.stamp(), NpzShard if _is_npz(path) else TorchShard
    entries = _kept_entries(path, stamp, absolute(path))
    candidates = [name for name, entry in entries.items() if _is_rows(entry)]
    name = column or (candidates[0] if len(candidates) == 1 else DEFAULT)
    if name not in candidates:
        names = ", ".join(f"{name or 'it'} {_describe(entry)}" for name, entry in entries.items())
        expected = "expected floats [rows, columns]; choose one as the column, or save it so"
        if any(isinstance(entry, torch.Tensor) and entry.is_sparse for entry in entries.values()):
            expected = "expected a dense tensor; save tensor.to_dense()"
        raise ValueError(f"{path}: has no rows {name!r}, only {names or 'no entry'}; {expected}")
    rows = entries[name]
    if rows.numel() * rows.element_size() > rows.untyped_storage().nbytes():
        raise ValueError(f"{path}: its rows share their memory; save tensor.contiguous()")
    return shard_class(path, len(rows), rows.shape[1], DTYPES[rows.dtype], name, stamp)


@lru_cache(maxsize=1)  # for every pass that follows over the same file
def _kept_entries(path: StoragePath, stamp: Stamp, place: str) -> dict[str, Any]:
    try:
        with explained(path), path.local_copy() as local:
            if _is_npz(path):
                with np.load(local, allow_pickle=False) as arrays:
                    return {
                        name: torch.from_numpy(array) if array.dtype in TORCH_DTYPES else array
                        for name, array in arrays.items()
                    }
            if zipfile.is_zipfile(local):  # torch allocates what a record says that it has
                with zipfile.ZipFile(local) as archive:
                    if any(record.file_size > stamp[0] for record in archive.infolist()):
                        raise ValueError("a record is larger than the file")
            value = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # hostile files make the libraries raise many kinds
        # EINVAL is a seek before the start, and bz2 has errors without a number.
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, None):
            raise
        fault = str(error).partition("\n")[0].partition(". ")[0]
        reason = f"it is truncated or damaged, or older than torch 1.6 ({fault})"
        advice = "write it again"
        if isinstance(error, pickle.UnpicklingError) or "allow_pickle" in str(error):
            reason = "it holds objects other than tensors, arrays and plain data"
            advice = "they are never loaded; write it without them"
        raise ValueError(f"{path}: cannot be read: {reason}; {advice}") from error
    if isinstance(value, torch.Tensor | dict):
        return value if isinstance(value, dict) else {"": value.detach()}
    raise ValueError(f"{path}: holds a {type(value).__name__}, expected a tensor or a dict of them")


def _is_npz(path: StoragePath) -> bool:
    return path.suffix.lower() in NpzWriter.suffixes


def _is_rows(entry: Any) -> bool:
    if not isinstance(entry, torch.Tensor) or entry.layout != torch.strided:
        return False
    return entry.dtype in DTYPES and entry.ndim == 2 and 0 < entry.shape[1] < MAX_COLUMNS


def _describe(entry: Any) -> str:
    if not isinstance(entry, torch.Tensor | np.ndarray):
        return type(entry).__name__
    is_sparse = isinstance(entry, torch.Tensor) and entry.is_sparse
    return f"{list(entry.shape)} {entry.dtype}{' sparse' * is_sparse}"
