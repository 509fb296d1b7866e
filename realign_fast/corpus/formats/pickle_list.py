"""Pickled lists of `{"id": ..., "embed": row, ...}`, as the code of the ReAlign paper writes them.

They are read only with `allow_pickle`, and nothing in them is run.
`csrc/io/pickle/pickle_interpreter.cpp` runs a file, builds nothing, refuses all that is not plain
data, and remembers where each row lies (4 bytes a row): arrays and floats lie in a pickle as the
bytes they are. A pass copies the rows out of the file, and an aligned file is the same bytes with
other numbers in their places. All rows are arrays `[D]` or `[1, D]` of one type, or lists of
floats. For the other columns, and for results of files in which rows share their bytes with other
values, Python's unpickler builds what was checked: then memory holds one file, at most `MAX_BYTES`
of it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, Stamp, StoragePath, explained
from ..io_extension import io as _io
from ..io_extension import reader_description
from ..shard import FormatWriter, Shard, absolute

MAX_BYTES = 4 << 30
MAX_STEPS = 1 << 27  # opcodes of a file
THREADS = 2  # that locate rows in files
REMEMBERED_FILES = 256  # for which the places of the rows are kept
DEFAULTS = ("embed", "embedding")
ADVICE = "expected a pickled list of {'id': ..., 'embed': row}; write it so, or as .npy"
ROWS = (
    "expected arrays [D] or [1, D] of one of <f2, <f4, <f8, or lists of floats, from protocol 3 on"
)
# The globals of plain data, by module; the native interpreter has checked how a file calls them.
GLOBALS = {
    "numpy": {"ndarray", "dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},  # with this and the next ones protocol 2 writes bytes and sets
    "builtins": {"bytes", "set", "frozenset"},
}


@dataclass(frozen=True)
class PickledShard(Shard):
    """The rows under one key of a pickled list of entries."""

    names: tuple[str, ...]  # the column is the first of them that row 0 has

    format = "pickle"

    @property
    def places(self) -> Any:
        """Places of the rows in the file, as `_io.PickledRows`; None if the list is empty."""
        return _located(self.path, self.stamp, self.names, absolute(self.path))

    @property
    def built_entries(self) -> list[Any]:
        """The list that the file holds, built as plain data."""
        return _entries(self.path, self.stamp, absolute(self.path))

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield rows that were copied from the file; see `Shard.pieces`."""
        return self.filled(first, self.num_rows, batch_rows, self._fill)

    def _fill(self, first: int, batch: np.ndarray) -> None:
        with self.unchanged_file() as descriptor:
            self.places.read(descriptor, first, batch)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows at sorted `ids`; see `Shard.take`."""
        self.check_unchanged()
        taken = np.empty((len(ids), self.dimension), self.dtype)
        with self.unchanged_file() as descriptor:
            for row, target in zip(ids.tolist(), taken, strict=True):
                self.places.read(descriptor, row, target)
        return taken.view(np.uint8)

    @contextmanager
    def unchanged_file(self) -> Iterator[int]:
        """Yield a descriptor of the file; an error if it is not the one whose rows were located."""
        with _opened(self.path, self.stamp) as descriptor:
            try:
                yield descriptor
            except _io.NotPlain as error:  # it is shorter than it was
                raise self.changed_error() from error
            if not self.path.is_remote:
                self.check_unchanged()

    @property
    def has_other_columns(self) -> bool:
        """True if an entry has another key than that of the rows."""
        return bool(self.places and self.places.has_others)

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the entries without their rows."""
        for entry in self.built_entries:
            yield {key: entry[key] for key in entry if key != self.column}

    def writer(self, path: AnyPath) -> FormatWriter:
        """Return a writer of a copy of the file with other rows."""
        is_copied = (places := self.places) and places.replaceable
        writer_class = PickleCopy if is_copied else PickleWriter
        return writer_class(path, self.num_rows, self.dimension, self.torch_dtype, self)


class PickleWriter(FormatWriter):
    """Write a pickled list; of `source` it keeps everything but the rows."""

    suffixes = (".pkl", ".pickle")
    accepts_entries = True

    def _begin(self) -> None:
        if self.num_rows * self.dimension * self.dtype.itemsize > MAX_BYTES:
            raise ValueError(f"{self.path}: a pickle is at most {MAX_BYTES} bytes; use parquet")
        self._entries: list[dict[str, Any]] = []

    def _append(self, rows: np.ndarray) -> None:
        for row in rows.copy():
            number = len(self._entries)
            if self._source:
                entry, column = self._source.built_entries[number], self._source.column
                old_row = entry[column]
                is_list = type(old_row) is list
                new_row: Any = row.tolist() if is_list else row.reshape(old_row.shape)
            else:
                entry = next(self._other_columns) if self._other_columns else {}
                column, new_row = DEFAULTS[0], row
            self._entries.append(entry | {column: new_row})

    def _finish(self) -> None:
        try:
            pickle.dump(self._entries, SimpleNamespace(write=self._put), protocol=4)
        except (ValueError, RecursionError) as error:
            problem = f"cannot keep the other columns of its source ({error})"
            raise ValueError(f"{self.path}: {problem}; {ADVICE}") from error


class PickleCopy(FormatWriter):
    """Write a copy of the source in which only the numbers of its rows are others."""

    suffixes = (".pkl", ".pickle")

    def _append(self, rows: np.ndarray) -> None:
        if len(rows):  # with the first row is copied what stands before it
            self._copy(self.written, rows)

    def _finish(self) -> None:
        self._copy(self.num_rows, np.empty(0, self._source.dtype))

    def _copy(self, first: int, rows: np.ndarray) -> None:
        with self._source.unchanged_file() as descriptor:
            self._source.places.write(descriptor, first, rows, self._file.fileno())


def read_shard(path: StoragePath, column: str | None = None) -> PickledShard:
    """Open a pickled list, which is read to its end; by default the rows are under `embed`."""
    stamp, names = path.stamp(), DEFAULTS if column is None else (column,)
    if places := _located(path, stamp, names, absolute(path)):
        name, dtype = names[places.name], np.dtype(f"<f{places.value_bytes}")
        return PickledShard(path, len(places), places.columns, dtype, name, stamp, names)
    entries = _entries(path, stamp, absolute(path))
    if not entries:  # beside others it takes their dimension
        return PickledShard(path, 0, 0, np.dtype("<f4"), names[0], stamp, names)
    keys = entries[0] if type(entries[0]) is dict else ()
    name = next((name for name in names if name in keys), names[0])
    kinds = [_kind(entry, name) for entry in entries]
    row = next((row for row, kind in enumerate(kinds) if kind != kinds[0]), 0)
    beside = f", row 0 {kinds[0]}" if row else ""
    found = f"{path}: row {row} under {name!r} is {kinds[row]}{beside}"
    raise ValueError(f"{found}; {ROWS}: pickle it again so")


def _kind(entry: Any, name: str) -> str:
    """Describe a row for an error."""
    if type(entry) is not dict:
        return f"missing: its entry is a {type(entry).__name__}"
    if name not in entry:
        return f"missing, of the keys {', '.join(map(repr, entry))}"
    row = entry[name]
    if isinstance(row, np.ndarray):
        return f"an array {list(row.shape)} of {row.dtype.str}"
    if not isinstance(row, list):
        return f"a {type(row).__name__}"
    return f"a list of {len(row)} {'/'.join(sorted({type(value).__name__ for value in row}))}"


class PlainUnpickler(pickle.Unpickler):
    """Python's unpickler, for pickles that `_io.check_pickle` has passed."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an object of `GLOBALS`."""
        known = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        if name not in GLOBALS.get(known, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(known, name)


def build(data: bytes) -> Any:
    """Return the value of a pickle of plain data; a ValueError says what else is in it."""
    _io.check_pickle(data, MAX_STEPS)
    try:
        return PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged arrays make numpy raise many kinds
        fault = f"{type(error).__name__}: {error!s:.100}"
        raise ValueError(f"a value cannot be built ({fault})") from error


@lru_cache(maxsize=REMEMBERED_FILES)
def _located(path: StoragePath, stamp: Stamp, names: tuple[str, ...], place: str) -> Any:
    """Return where the rows lie in a file, under the first of `names` that row 0 has, or None.

    It is a ValueError if the file is not plain data, or nothing is compiled that could check it.
    """
    if not _io:
        problem = f"pickles are read by the native reader alone, and rows by {reader_description()}"
        raise ValueError(f"{path}: {problem}; install a C++ compiler and this package again")
    if stamp[0] > MAX_BYTES:
        problem = f"has {stamp[0]} bytes, and a pickle can only be read whole"
        raise ValueError(f"{path}: {problem}: expected at most {MAX_BYTES}; split it")
    keys = tuple(name.encode(errors="surrogatepass") for name in names)
    with _opened(path, stamp) as descriptor, _plain(path):
        return _io.PickledRows(descriptor, stamp[0], keys, MAX_STEPS) or None


@contextmanager
def _plain(path: StoragePath) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: not plain data: {error}; {ADVICE}") from error


@contextmanager
def _opened(path: StoragePath, stamp: Stamp) -> Iterator[int]:
    with explained(path), path.local_copy(stamp) as local, open(local, "rb") as file:
        yield file.fileno()


@lru_cache(maxsize=1)  # one file is in memory at a time, for every pass that follows
def _entries(path: StoragePath, stamp: Stamp, place: str) -> list[Any]:
    with explained(path):
        data = path.read_bytes()
    with _plain(path):
        value = build(data)
    if type(value) is not list:
        raise ValueError(f"{path}: holds a {type(value).__name__}; {ADVICE}")
    return value
