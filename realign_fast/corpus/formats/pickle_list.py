"""Pickled lists of `{"id": ..., "embed": row, ...}`, as the code of the ReAlign paper writes them.

They are read only with `allow_pickle`, and nothing in them is run.
`csrc/io/pickle/pickle_interpreter.cpp` runs a file, builds nothing, refuses all that is not plain
data, and remembers where each row lies (4 bytes a row): arrays and floats lie in a pickle as the
bytes they are. A pass copies the rows out of the file, and an aligned file is the same bytes with
other numbers in their places. In unusual files (rows of several types, tensors, bytes that two
values share or that protocol 2 wrote as text), and for all columns but the rows, Python's unpickler
builds what was checked: then memory holds one file, at most `MAX_BYTES` of it, and its result. A
row is an array or tensor `[D]` or `[1, D]`, or a list of numbers; the widest of their types is that
of all. Tensors of bfloat16 are read as float32, and the results of tensors are arrays. An entry
without a row, or with None, is a row of NaN.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ...storage.paths import AnyPath, Stamp, StoragePath, explained
from ..io_extension import io as _io
from ..io_extension import reader_description
from ..shard import Shard, absolute, check_vector
from ..shard_writer import FormatWriter

MAX_BYTES = 4 << 30
MAX_STEPS = 1 << 27  # opcodes of a file
THREADS = 2  # that locate rows in files; what they leave is built one at a time
REMEMBERED_FILES = 256  # for which the places of the rows are kept
DEFAULTS = ("embed", "embedding")
ADVICE = "expected a pickled list of {'id': ..., 'embed': row}; write it so, or as .npy"
# The globals of plain data, by module; the native interpreter has checked how a file calls them.
GLOBALS = {
    "numpy": {"ndarray", "dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},  # with this and the next ones protocol 2 writes bytes and sets
    "builtins": {"bytes", "set", "frozenset"},
    "collections": {"OrderedDict"},  # the hooks of a tensor, of which it has none
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.storage": {"_load_from_bytes"},
}
_building = Lock()


@dataclass(frozen=True)
class PickledShard(Shard):
    """The rows under one key of a pickled list of entries."""

    names: tuple[str, ...]  # the column is the first of them that row 0 has

    format = "pickle"

    @property
    def places(self) -> Any:
        """Places of the rows in the file, as `_io.PickledRows`; None if entries must be built."""
        return _places(self.path, self.stamp, self.names)

    @property
    def built_entries(self) -> list[Any]:
        """The list that the file holds, built as plain data."""
        return _entries(self.path, self.stamp, absolute(self.path))

    @property
    def built_rows(self) -> np.ndarray:
        """The rows [num_rows, D] of `built_entries`."""
        return _built(self.path, self.stamp, self.names, absolute(self.path))[1]

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield rows that were copied from the file or built; see `Shard.pieces`."""
        return self.filled(first, self.num_rows, batch_rows, self._fill)

    def _fill(self, first: int, batch: np.ndarray) -> None:
        if places := self.places:
            with self.unchanged_file() as descriptor:
                places.read(descriptor, first, batch)
        else:
            batch[:] = self.built_rows[first : first + len(batch)]

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows at sorted `ids`; see `Shard.take`."""
        if (places := self.places) is None:
            rows: np.ndarray = self.built_rows[ids]
            return rows.view(np.uint8)
        self.check_unchanged()
        taken = np.empty((len(ids), self.dimension), self.dtype)
        with self.unchanged_file() as descriptor:
            for row, target in zip(ids.tolist(), taken, strict=True):
                places.read(descriptor, row, target)
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
        places = self.places
        return bool(places.has_others if places else any(self.other_columns()))

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
        """Append the next entries of the source with other rows in the form of theirs, or new."""
        for row in rows.copy():
            number = len(self._entries)
            if self._source:
                entry, column = self._source.built_entries[number], self._source.column
                old_row = entry.get(column)
                new_row: Any = row.tolist() if type(old_row) is list else row
                if isinstance(old_row, np.ndarray):
                    new_row = row.reshape(old_row.shape)
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
    if places := _places(path, stamp, names):
        name, dtype = names[places.name], np.dtype(f"<f{places.value_bytes}")
        return PickledShard(path, len(places), places.columns, dtype, name, stamp, names)
    with _building:
        name, rows = _built(path, stamp, names, absolute(path))
    return PickledShard(path, len(rows), rows.shape[1], rows.dtype, name, stamp, names)


@lru_cache(maxsize=1)  # one file is in memory at a time, for every pass that follows
def _built(
    path: StoragePath, stamp: Stamp, names: tuple[str, ...], place: str
) -> tuple[str, np.ndarray]:
    """Build a file; return the key of its rows, the first of `names` there is, and the rows."""
    entries = _entries(path, stamp, place)
    if not entries:  # beside others it takes their dimension
        return names[0], np.empty((0, 0), "<f4")
    keys = dict.fromkeys(key for entry in entries if type(entry) is dict for key in entry)
    name = next((name for name in names if name in keys), names[0])
    if name not in keys:
        _vector(path, 0, entries[0], name)  # says so if the entries are no dicts
        problem = f"row 0 has no key {name!r}; choose one as the column, of: "
        raise ValueError(f"{path}: {problem}{', '.join(map(repr, keys))}")
    vectors = [_vector(path, number, entry, name) for number, entry in enumerate(entries)]
    known = [vector for vector in vectors if vector is not None]
    if not known:
        raise ValueError(f"{path}: no entry has a row under {name!r}; leave the file out")
    dtype = np.result_type(*{vector.dtype for vector in known})  # the widest of them
    rows = np.full((len(vectors), known[0].size), np.nan, dtype)
    for number, vector in enumerate(vectors):
        if vector is not None and vector.size != rows.shape[1]:
            found = f"{path}: row {number} holds {vector.size} of {vector.dtype}"
            raise ValueError(f"{found}, expected {rows.shape[1]} numbers as in the first row")
        if vector is not None:
            rows[number] = vector
    return name, rows


class PlainUnpickler(pickle.Unpickler):
    """Python's unpickler, for pickles that `_io.check_pickle` has passed."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an object of `GLOBALS`; a storage of torch is loaded without running its code."""
        known = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        if name not in GLOBALS.get(known, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}")
        own = {"_load_from_bytes": _storage, "_rebuild_tensor_v2": _tensor}
        return own.get(name) or super().find_class(known, name)


def _storage(data: bytes) -> torch.Tensor:
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=storage.dtype).set_(storage)


def _tensor(numbers: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    return numbers.as_strided(size, stride, offset)  # an error beyond the storage


def build(data: bytes) -> Any:
    """Return the value of a pickle of plain data; a ValueError says what else is in it."""
    _io.check_pickle(data, MAX_STEPS)
    try:
        return PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged arrays and tensors make numpy and torch raise many kinds
        fault = f"{type(error).__name__}: {error!s:.100}"
        raise ValueError(f"an array or tensor is damaged ({fault})") from error


def _places(path: StoragePath, stamp: Stamp, names: tuple[str, ...]) -> Any:
    """Return where the rows lie in a file, under the first of `names` that row 0 has, or None.

    It is a ValueError if the file is not plain data, or nothing is compiled that could check it.
    """
    if not _io:
        problem = f"pickles are read by the native reader alone, and rows by {reader_description()}"
        raise ValueError(f"{path}: {problem}; install a C++ compiler and this package again")
    if stamp[0] > MAX_BYTES:
        problem = f"has {stamp[0]} bytes, and a pickle can only be read whole"
        raise ValueError(f"{path}: {problem}: expected at most {MAX_BYTES}; split it")
    return _located(path, stamp, names, absolute(path))


@lru_cache(maxsize=REMEMBERED_FILES)
def _located(path: StoragePath, stamp: Stamp, names: tuple[str, ...], place: str) -> Any:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int | np.floating | np.integer) and type(value) is not bool


def _vector(path: StoragePath, number: int, entry: Any, column: str) -> np.ndarray | None:
    """Return the row `[D]` of an entry; None if it has none, or None in its place."""
    place = f"{path}: row {number}"
    if type(entry) is not dict:
        raise ValueError(f"{place} is a {type(entry).__name__}; {ADVICE}")
    if (row := entry.get(column)) is None:
        return None
    if type(row) is list and all(map(_is_number, row)):
        try:
            are_floats = all(isinstance(value, np.floating) for value in row)
            row = np.array(row, None if are_floats else np.float64)
        except OverflowError as error:
            raise ValueError(f"{place}: {column!r} holds a number beyond float64") from error
    if isinstance(row, torch.Tensor):
        row = row.detach()
        row = (row.float() if row.dtype == torch.bfloat16 else row).numpy()
    if not isinstance(row, np.ndarray):
        expected = "expected an array or tensor of float16, float32 or float64, or a list of floats"
        raise TypeError(f"{place}: {column!r} is {type(row).__name__}, {expected}")
    row = row.astype(row.dtype.newbyteorder("="), copy=False)
    check_vector(f"{place}: {column!r}", row)
    return row.reshape(-1)
