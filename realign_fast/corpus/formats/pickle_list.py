"""A shard as the paper's code writes it: a pickled list of `{"id": ..., "embed": row, ...}`.

Read only when asked to (`allow_pickle`), by machines that run nothing. `pickled_direct.py` copies
rows out of files and into copies of them. Files that it leaves, and what is beside the rows,
`unpickle.py` builds as plain data: then memory holds one file, at most `MAX_BYTES` of it, and while
a shard is written its result. All keys but the rows', and their order, are kept. A row is an array
`[D]` or `[1, D]` of float16, float32 or float64, or a list of floats.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch

from ...storage.paths import AnyPath, StoragePath, explained
from ..io_extension import io as _io
from ..streamed_shard import StreamedShard, torch_dtype
from .npy import MAX_COLUMNS, TORCH_DTYPES, ShardWriter, changed
from .pickle_interpreter import load
from .pickle_rows import PickleCopy, direct_rows, read_direct, take_direct
from .pickle_values import Array

MAX_BYTES = 4 << 30
THREADS = 2 if _io else 1  # that look through files; what they leave is built one at a time
OTHER_ROWS = 1024
DEFAULTS = ("embed", "embedding")
_building = Lock()
ADVICE = "expected a pickled list of {'id': ..., 'embed': row}; write it so, or as .npy"


@dataclass(frozen=True)
class PickledShard(StreamedShard):
    asked: str | None = None  # for the key of the rows
    format = "pickle"

    @property
    def _direct(self) -> Any:
        return _direct(self.path, self.stamp, self.asked)

    def pieces(self, first: int, size: int) -> Iterator[np.ndarray]:
        if direct := self._direct:
            yield from read_direct(self, direct, first, size)
            return
        entries = _entries(self.path, self.stamp)
        for begin in range(first, self.num_rows, size):
            part = entries[begin : begin + size]
            out = np.empty((len(part), self.dimension), self.dtype)
            for place, entry in enumerate(part):
                out[place] = self._row(entry, begin + place)
            yield out

    def take(self, ids: np.ndarray) -> np.ndarray:
        if (direct := self._direct) is None:
            return super().take(ids)
        if self.path.stamp() != self.stamp:
            raise changed(self)
        return take_direct(self, direct, ids)

    def _row(self, entry: Any, number: int) -> np.ndarray:
        row = _vector(self.path, number, entry, self.column)
        if (row.size, row.dtype) != (self.dimension, self.dtype):
            got, want = f"{row.size} of {row.dtype}", f"{self.dimension} of {self.dtype}"
            what = f"row {number}: {self.column!r} holds {got} numbers, expected {want} as in row 0"
            raise ValueError(f"{self.path}: {what}; embed all with one encoder")
        return row

    @property
    def others(self):
        if direct := self._direct:
            return self._other_columns if direct.has_others else None
        several = any(len(entry) > 1 for entry in _entries(self.path, self.stamp))
        return self._other_columns if several else None

    def _other_columns(self) -> Iterator[list[dict[str, Any]]]:
        """What is beside the rows, a list of entries at a time; arrays as numpy's."""
        entries = _entries(self.path, self.stamp)
        for begin in range(0, len(entries), OTHER_ROWS):
            yield [
                {
                    key: value.value if type(value) is Array else value
                    for key, value in entry.items()
                    if key != self.column
                }
                for entry in entries[begin : begin + OTHER_ROWS]
            ]

    def writer(self, path: AnyPath) -> ShardWriter:
        if (direct := self._direct) and direct.replaceable:
            return PickleCopy(path, self, direct)
        return PickleWriter(path, self.num_rows, self.dimension, torch_dtype(self), self)


class PickleWriter(ShardWriter):
    """`ShardWriter` for a pickled list; of `source` it keeps everything but the rows."""

    suffix = (".pkl", ".pickle")

    def __init__(
        self,
        path: AnyPath,
        num_rows: int,
        dimension: int,
        dtype: torch.dtype,
        source: PickledShard | None = None,
        others: Iterator[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(path, num_rows, dimension, dtype, source, others)
        if num_rows * dimension * dtype.itemsize > MAX_BYTES:
            raise ValueError(f"{path}: a pickle is at most {MAX_BYTES} bytes; convert to parquet")

    def _begin(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def _append(self, rows: np.ndarray) -> None:
        begin, source = len(self._entries), self._source
        old = _entries(source.path, source.stamp)[begin : begin + len(rows)] if source else None
        for place, row in enumerate(rows.copy()):
            if source:
                entry = old[place]
                before = entry[source.column]
                row = row.tolist() if type(before) is list else row.reshape(before.value.shape)
                self._entries.append(entry | {source.column: row})
            else:
                other = next(self._others) if self._others else {"id": begin + place}
                self._entries.append(other | {DEFAULTS[0]: row})

    def _finish(self) -> None:
        with io.BufferedWriter(_Unclosed(self._file), 1 << 20) as file:
            try:
                pickle.dump(self._entries, file, protocol=4)
            except (ValueError, RecursionError) as error:
                what = f"cannot keep what is beside the rows ({error})"
                raise ValueError(f"{self.path}: {what}; {ADVICE}") from error


class _Unclosed(io.RawIOBase):
    """A raw file that stays open when the buffer on it is closed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)


def read_shard(path: StoragePath, column: str | None = None) -> PickledShard:
    stamp = path.stamp()
    if direct := _direct(path, stamp, column):
        name, dtype = _names(column)[direct.name], np.dtype(f"<f{direct.value_bytes}")
        return PickledShard(path, len(direct), direct.columns, dtype, name, stamp, column)
    with _building:
        entries = _entries(path, stamp)
        if not entries:
            raise ValueError(f"{path}: an empty list has no dimension; leave the file out")
        first = entries[0] if type(entries[0]) is dict else {}
        name = next((one for one in _names(column) if one in first), _names(column)[0])
        row = _vector(path, 0, entries[0], name)
        return PickledShard(path, len(entries), row.size, row.dtype, name, stamp, column)


def _names(column: str | None) -> tuple[str, ...]:
    return DEFAULTS if column is None else (column,)


def _direct(path: StoragePath, stamp: tuple[int, int | str], column: str | None) -> Any:
    """Where the rows lie in the file, or None: they are those of `_entries`."""
    return direct_rows(path, stamp, _names(column)) if stamp[0] <= MAX_BYTES else None


@lru_cache(maxsize=1)  # one file is in memory at a time, for every pass that follows
def _entries(path: StoragePath, stamp: tuple[int, int]) -> list[Any]:
    if stamp[0] > MAX_BYTES:
        got = f"has {stamp[0]} bytes, and a pickle can only be read whole"
        raise ValueError(f"{path}: {got}: expected at most {MAX_BYTES}; split it, or write parquet")
    with explained(path):
        data = path.read_bytes()
    try:
        value = load(memoryview(data))
    except ValueError as error:
        raise ValueError(f"{path}: not plain data: {error}; {ADVICE}") from error
    if type(value) is not list:
        raise ValueError(f"{path}: holds a {type(value).__name__}; {ADVICE}")
    return value


def _vector(path: StoragePath, number: int, entry: Any, column: str) -> np.ndarray:
    """The row of one entry, `[D]`."""
    where = f"{path}: row {number}"
    if type(entry) is not dict:
        raise ValueError(f"{where} is a {type(entry).__name__}; {ADVICE}")
    if column not in entry:
        there = ", ".join(map(repr, entry))
        raise ValueError(f"{where} has no key {column!r}; choose one as the column, of: {there}")
    value = entry[column]
    row = value.value if type(value) is Array else None
    if type(value) is list and all(type(one) in (float, int) for one in value):
        try:
            row = np.array(value, np.float64)
        except OverflowError as error:
            raise ValueError(f"{where}: {column!r} holds a number beyond float64") from error
    if row is None or row.dtype not in TORCH_DTYPES:
        got = row.dtype if row is not None else type(value).__name__
        want = "expected an array of float16, float32 or float64, or a list of floats"
        raise TypeError(f"{where}: {column!r} is {got}, {want}")
    if row.shape not in ((row.size,), (1, row.size)) or not 0 < row.size < MAX_COLUMNS:
        raise ValueError(f"{where}: {column!r} has shape {row.shape}, expected [D] or [1, D]")
    return row.reshape(-1)
