"""Pickled lists of `{"id": ..., "embed": row, ...}`, as the code of the ReAlign paper writes them.

They are read only with `allow_pickle`, and nothing in them is run. `pickle_rows.py` copies rows out
of files and into copies of them. Files that it leaves, and all columns but the rows, are built as
plain data by `pickle_interpreter.py`: then memory holds one file, at most `MAX_BYTES` of it, and
its result while that is written. The keys of an entry and their order are kept. A row is an array
`[D]` or `[1, D]` of float16, float32 or float64, or a list of floats.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, Stamp, StoragePath, explained
from ..io_extension import io as _io
from ..shard import FLOATS, MAX_COLUMNS
from ..shard_writer import FormatWriter
from ..streamed_shard import StreamedShard
from .pickle_interpreter import load
from .pickle_rows import PickleCopy, direct_rows, read_direct, take_direct
from .pickle_values import Array

MAX_BYTES = 4 << 30
THREADS = 2 if _io else 1  # that locate rows in files; what they leave is built one at a time
CHUNK_ENTRIES = 1024  # of other columns at a time
DEFAULTS = ("embed", "embedding")
ADVICE = "expected a pickled list of {'id': ..., 'embed': row}; write it so, or as .npy"
_building = Lock()


@dataclass(frozen=True)
class PickledShard(StreamedShard):
    """The rows under one key of a pickled list of entries."""

    requested_column: str | None = None

    format = "pickle"

    @property
    def _direct(self) -> Any:
        return _direct(self.path, self.stamp, self.requested_column)

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield rows that were copied from the file or built; see `StreamedShard.pieces`."""
        if direct := self._direct:
            yield from read_direct(self, direct, first, batch_rows)
            return
        entries = _entries(self.path, self.stamp)
        for start in range(first, self.num_rows, batch_rows):
            part = entries[start : start + batch_rows]
            batch = np.empty((len(part), self.dimension), self.dtype)
            for place, entry in enumerate(part):
                batch[place] = self._row(entry, start + place)
            yield batch

    def take_rows(self, ids: np.ndarray) -> np.ndarray:
        """Read the rows at sorted `ids`: only they are read, unless the file has to be built."""
        if (direct := self._direct) is None:
            return super().take_rows(ids)
        if self.path.stamp() != self.stamp:
            raise self.changed_error()
        return take_direct(self, direct, ids)

    def _row(self, entry: Any, number: int) -> np.ndarray:
        row = _vector(self.path, number, entry, self.column)
        if (row.size, row.dtype) != (self.dimension, self.dtype):
            actual = f"{self.column!r} holds {row.size} of {row.dtype} numbers"
            expected = f"expected {self.dimension} of {self.dtype} as in row 0"
            advice = "embed all with one encoder"
            raise ValueError(f"{self.path}: row {number}: {actual}, {expected}; {advice}")
        return row

    @property
    def has_other_columns(self) -> bool:
        """True if an entry has other keys than that of its row."""
        if direct := self._direct:
            return bool(direct.has_others)
        return any(len(entry) > 1 for entry in _entries(self.path, self.stamp))

    def other_columns(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the entries without their rows, `CHUNK_ENTRIES` at a time."""
        entries = _entries(self.path, self.stamp)
        for start in range(0, len(entries), CHUNK_ENTRIES):
            yield [
                {
                    key: value.value if type(value) is Array else value
                    for key, value in entry.items()
                    if key != self.column
                }
                for entry in entries[start : start + CHUNK_ENTRIES]
            ]

    def writer(self, path: AnyPath) -> PickleCopy | PickleWriter:
        """Return a writer of a copy of the file with other rows."""
        if (direct := self._direct) and direct.replaceable:
            return PickleCopy(path, self, direct)
        return PickleWriter(path, self.num_rows, self.dimension, self.torch_dtype, self)


class PickleWriter(FormatWriter):
    """Write a pickled list; of `source` it keeps everything but the rows."""

    suffixes = (".pkl", ".pickle")
    accepts_entries = True

    def _begin(self) -> None:
        if self.num_rows * self.dimension * self.dtype.itemsize > MAX_BYTES:
            advice = "convert to parquet"
            raise ValueError(f"{self.path}: a pickle is at most {MAX_BYTES} bytes; {advice}")
        self._entries: list[dict[str, Any]] = []

    def _append(self, rows: np.ndarray) -> None:
        if self._source:
            self._append_to_source(rows)
            return
        for row in rows.copy():
            columns = self._other_columns
            entry = next(columns) if columns else {"id": len(self._entries)}
            self._entries.append(entry | {DEFAULTS[0]: row})

    def _append_to_source(self, rows: np.ndarray) -> None:
        """Append the next entries of the source, with other rows in the form of theirs."""
        column, start = self._source.column, len(self._entries)
        entries = _entries(self._source.path, self._source.stamp)[start : start + len(rows)]
        for entry, row in zip(entries, rows.copy(), strict=True):
            old = entry[column]
            new = row.tolist() if type(old) is list else row.reshape(old.value.shape)
            self._entries.append(entry | {column: new})

    def _finish(self) -> None:
        try:
            pickle.dump(self._entries, SimpleNamespace(write=self._put), protocol=4)
        except (ValueError, RecursionError) as error:
            problem = f"cannot keep the other columns of its source ({error})"
            raise ValueError(f"{self.path}: {problem}; {ADVICE}") from error


def read_shard(path: StoragePath, column: str | None = None) -> PickledShard:
    """Open a pickled list, which is read to its end; by default the rows are under `embed`."""
    stamp = path.stamp()
    if direct := _direct(path, stamp, column):
        name, dtype = _names(column)[direct.name], np.dtype(f"<f{direct.value_bytes}")
        return PickledShard(path, len(direct), direct.columns, dtype, name, stamp, column)
    with _building:
        entries = _entries(path, stamp)
        if not entries:
            raise ValueError(f"{path}: an empty list has no dimension; leave the file out")
        keys = entries[0] if type(entries[0]) is dict else {}
        name = next((name for name in _names(column) if name in keys), _names(column)[0])
        row = _vector(path, 0, entries[0], name)
        return PickledShard(path, len(entries), row.size, row.dtype, name, stamp, column)


def _names(column: str | None) -> tuple[str, ...]:
    return DEFAULTS if column is None else (column,)


def _direct(path: StoragePath, stamp: Stamp, column: str | None) -> Any:
    """Return where the rows lie in the file, or None if its entries have to be built."""
    return direct_rows(path, stamp, _names(column)) if stamp[0] <= MAX_BYTES else None


@lru_cache(maxsize=1)  # one file is in memory at a time, for every pass that follows
def _entries(path: StoragePath, stamp: Stamp) -> list[Any]:
    """Return the list that the file holds, built as plain data."""
    if stamp[0] > MAX_BYTES:
        problem = f"has {stamp[0]} bytes, and a pickle can only be read whole"
        advice = "split it, or write parquet"
        raise ValueError(f"{path}: {problem}: expected at most {MAX_BYTES}; {advice}")
    with explained(path):
        data = path.read_bytes()
    try:
        value = load(data)
    except ValueError as error:
        raise ValueError(f"{path}: not plain data: {error}; {ADVICE}") from error
    if type(value) is not list:
        raise ValueError(f"{path}: holds a {type(value).__name__}; {ADVICE}")
    return value


def _vector(path: StoragePath, number: int, entry: Any, column: str) -> np.ndarray:
    """Return the row `[D]` of an entry."""
    place = f"{path}: row {number}"
    if type(entry) is not dict:
        raise ValueError(f"{place} is a {type(entry).__name__}; {ADVICE}")
    if column not in entry:
        keys = ", ".join(map(repr, entry))
        raise ValueError(f"{place} has no key {column!r}; choose one as the column, of: {keys}")
    value = entry[column]
    row = value.value if type(value) is Array else None
    if type(value) is list and all(type(number) in (float, int) for number in value):
        try:
            row = np.array(value, np.float64)
        except OverflowError as error:
            raise ValueError(f"{place}: {column!r} holds a number beyond float64") from error
    if row is None or row.dtype not in FLOATS:
        actual = row.dtype if row is not None else type(value).__name__
        expected = "expected an array of float16, float32 or float64, or a list of floats"
        raise TypeError(f"{place}: {column!r} is {actual}, {expected}")
    if row.shape not in ((row.size,), (1, row.size)) or not 0 < row.size < MAX_COLUMNS:
        raise ValueError(f"{place}: {column!r} has shape {row.shape}, expected [D] or [1, D]")
    return row.reshape(-1)
