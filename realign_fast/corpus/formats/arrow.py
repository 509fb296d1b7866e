"""Arrow IPC files and streams, the data of Hugging Face datasets, and tables in memory.

A local file is mapped. A batch of rows is copied out of the map, and the mapped pages are released
every `RELEASE_BYTES`, so memory is bounded whatever the size of the record batches (compressed ones
are decompressed whole). From a URL record batches are fetched one after the other.

Opening a file counts its rows: pyarrow goes through its record batches, which for a mapped file
touches their heads alone. A compressed file is decompressed for it, and of a remote file the column
of rows is fetched, of a remote stream everything.

A table in memory is any object with Arrow's stream interface (`__arrow_c_stream__`): of pyarrow,
pandas, polars, DuckDB. It is turned into a `pyarrow.Table` once, without a copy where its library
keeps Arrow's memory. A column alone (a Series) is a table of its rows. A `Dataset` of the datasets
library is read in pieces; so is an `IterableDataset`, which is read once more to count its rows.

`save_to_disk` writes streams and `state.json`, which names them in their order. The result of such
a dataset has a fingerprint of its own: under the old one, `map` of the datasets library would find
what it has cached for the old rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ...storage.paths import LocalPath, StoragePath, explained, write_whole
from ..io_extension import io as _io
from . import arrow_columns as tables

MAGIC = b"ARROW1"
RELEASE_BYTES = 16 << 20
DATASET_STATE, DATASET_INFO = "state.json", "dataset_info.json"
PIECE_ROWS = 1024  # of a dataset or a table at a time
DATASET_SPLITS = "dataset_dict.json"
SHARD_HEAD_BYTES = 1 << 20  # of each shard, for the fingerprint of a dataset
SAVE = "save the dataset with save_to_disk"
_PLAIN: dict[str, Any] = {"_format_kwargs": {}, "_output_all_columns": False}
_PLAIN |= dict.fromkeys(("_format_columns", "_format_type", "_split"))

Data: TypeAlias = mmap.mmap | io.BufferedReader


class ArrowWriter(tables.TableWriter):
    """Write an Arrow IPC file; see `FormatWriter`."""

    suffixes = (".arrow", ".feather")

    def _open_table(self, file: Any) -> Any:
        return tables.pyarrow().ipc.new_file(file, self.columns.schema)


class StreamWriter(ArrowWriter):
    """Write an Arrow IPC stream, the form of Hugging Face datasets; see `FormatWriter`."""

    def _open_table(self, file: Any) -> Any:
        return tables.pyarrow().ipc.new_stream(file, self.columns.schema)


@dataclass(frozen=True)
class ArrowShard(tables.TableShard):
    """One column of an Arrow IPC file."""

    format = "arrow"
    writer_class = ArrowWriter

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield views of the mapped record batches; see `Shard.pieces`."""
        batch_first, unreleased = 0, 0  # row, bytes
        with _opened_data(self.path) as data:
            for batch in _record_batches(data, self.column):
                array, end = batch.column(self.column), batch_first + len(batch)
                for row in range(max(first, batch_first), end, batch_rows):
                    if isinstance(data, mmap.mmap) and self.path.stamp()[0] != len(data):
                        raise self.changed_error()  # touching a page that is gone would be a SIGBUS
                    yield tables.rows_of(array[row - batch_first :][:batch_rows], self, row)
                    unreleased += batch_rows * self.row_bytes
                    if isinstance(data, mmap.mmap) and unreleased >= RELEASE_BYTES:
                        data.madvise(mmap.MADV_DONTNEED)
                        unreleased = 0
                batch_first = end

    def record_batches(self, names: list[str], first: int = 0) -> Iterator[Any]:
        """Yield columns as the record batches of the file."""
        with _opened_data(self.path) as data:
            for batch in _record_batches(data):
                columns = enumerate(batch.schema.names)  # two columns may have one name
                yield batch.select([place for place, name in columns if name in names])


@dataclass(frozen=True)
class StreamShard(ArrowShard):
    """One column of an Arrow IPC stream."""

    format = "arrow-stream"
    writer_class = StreamWriter


def read_shard(path: StoragePath, column: str | None = None) -> ArrowShard:
    """Open a column of rows of an Arrow IPC file or stream; see `vectors_of` for its choice."""
    stamp = path.stamp()
    with _opened_data(path) as data:
        reader = _open_reader(data)
        vectors = tables.vectors_of(
            path, reader.schema, column, lambda name: _record_batches(data, name)
        )
        num_rows = sum(map(len, _record_batches(data, vectors[2])))
    shard_class = StreamShard if _is_stream(reader) else ArrowShard
    return shard_class(path, num_rows, *vectors, stamp, reader.schema)


@contextmanager
def _opened_data(path: StoragePath) -> Iterator[Data]:
    """Map a local file, or open a remote one that fetches what is read."""
    if not path.stamp()[0]:
        raise ValueError(f"{path}: is empty, expected an Arrow file or stream; write it again")
    with explained(path), path.open("rb") as file, tables.decoded(path, file):
        if path.is_remote:
            yield file
            return
        # Arrays may view the map, so the last one of them unmaps it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = _io and _io.MappedBuffer(data)  # which knows whether pages of the map went
        yield data
        if buffer and buffer.lost:
            raise ValueError(f"{path}: changed while it was read; open it again")


def _open_reader(data: Data, column: str | None = None) -> Any:
    """Return a reader of record batches.

    A remote file is read without its other columns, if `column` is given. (A reader of one column
    of a mapped file would copy it.)
    """
    pa = tables.pyarrow()
    data.seek(0)
    open_data = pa.ipc.open_file if data.read(len(MAGIC)) == MAGIC else pa.ipc.open_stream
    data.seek(0)
    if isinstance(data, mmap.mmap):
        return open_data(pa.py_buffer(data))
    reader = open_data(data)
    if column is None or _is_stream(reader):
        return reader
    index = reader.schema.get_field_index(column)
    options = pa.ipc.IpcReadOptions(included_fields=[index])
    data.seek(0)
    return open_data(data, options=options)


def _is_stream(reader: Any) -> bool:
    return isinstance(reader, tables.pyarrow().ipc.RecordBatchStreamReader)


def _record_batches(data: Data, column: str | None = None) -> Iterator[Any]:
    reader = _open_reader(data, column)
    if _is_stream(reader):
        return iter(reader)
    return map(reader.get_batch, range(reader.num_record_batches))


class MemoryPath(LocalPath):
    """The name of a table or dataset, where a shard has the path of its file."""

    def stamp(self) -> tuple[int, int]:
        """Return a constant: nothing in memory is compared."""
        return 0, 0

    def identity(self) -> dict[str, int | str]:
        """Raise a TypeError: no other process and no later run could find the rows."""
        raise TypeError(f"{self}: its rows are in memory, expected files; save it as parquet first")


@dataclass(frozen=True)
class MemoryShard(tables.TableShard):
    """One column of a table or dataset."""

    data: Any = field(repr=False, compare=False)  # a `pyarrow.Table`, or a dataset in Arrow's form

    format = "arrow"
    writer_class = ArrowWriter

    def record_batches(self, names: list[str], first: int = 0) -> Iterator[Any]:
        """Yield columns from row `first` on, `PIECE_ROWS` rows at a time."""
        return _table_batches(self.data, names, first)


def is_table(data: object) -> bool:
    """Return whether rows can be read from an object as from a table."""
    return hasattr(data, "__arrow_c_stream__") or _is_dataset(data)


def read_table(data: Any, column: str | None = None) -> MemoryShard:
    """Open a column of rows of a table or dataset; see `vectors_of` for its choice."""
    pa, path = tables.pyarrow(), MemoryPath(type(data).__name__)
    try:
        if _is_dataset(data):
            data = data.with_format("arrow")
            schema = next((table.schema for table in data.iter(1)), pa.schema([]))
        else:
            is_column = not (hasattr(data, "columns") or hasattr(data, "schema"))
            table = {column or tables.DEFAULT: pa.chunked_array(data)} if is_column else data
            data = pa.table(table)
            schema = data.schema
    except (pa.ArrowException, TypeError) as error:
        reason = " ".join(str(error).split())
        expected = "expected columns of one type each, and vectors of one length"
        raise TypeError(f"{path}: cannot become an Arrow table ({reason}); {expected}") from error

    vectors = tables.vectors_of(path, schema, column, lambda name: _table_batches(data, [name]))
    has_length = hasattr(data, "__len__")
    num_rows = len(data) if has_length else sum(map(len, _table_batches(data, [vectors[2]])))
    return MemoryShard(path, num_rows, *vectors, path.stamp(), schema, data)


def _is_dataset(data: object) -> bool:
    return all(hasattr(data, name) for name in ("with_format", "select_columns", "iter"))


def _table_batches(data: Any, names: list[str], first: int = 0) -> Iterator[Any]:
    """Yield columns from row `first` on."""
    if not _is_dataset(data):
        yield from data.select(names).slice(first).to_batches(PIECE_ROWS)
        return
    for table in data.select_columns(names).skip(first).iter(PIECE_ROWS):
        yield from table.combine_chunks().to_batches()


def splits_of(folder: StoragePath) -> list[str]:
    """Return the names of the splits of the `DatasetDict` in a folder."""
    splits = _load_object(folder / DATASET_SPLITS).get("splits")
    return [name for name in splits or [] if isinstance(name, str)] or ["one of its folders"]


def data_files(folder: StoragePath) -> list[StoragePath]:
    """Return the shards of the dataset in a folder, in its order."""
    state = _load_object(folder / DATASET_STATE)
    files = state.get("_data_files") or [None]
    names: list[Any] = [file.get("filename") if isinstance(file, dict) else None for file in files]
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise ValueError(f"{folder / DATASET_STATE}: expected _data_files to name files; {SAVE}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{folder / DATASET_STATE}: indexed; call flatten_indices() and {SAVE}")
    return [folder / name for name in names]


def write_state(
    folder: StoragePath, shards: Sequence[StoragePath], source: StoragePath | None = None
) -> None:
    """Write the json files that make a dataset of `shards`; information of `source` is kept."""
    state: dict[str, Any] = _load_object(source / DATASET_STATE) if source else _PLAIN
    has_info = source and (source / DATASET_INFO).exists()
    info = _load_object(source / DATASET_INFO) if source and has_info else {}
    digest = hashlib.sha256(str(state.get("_fingerprint")).encode())
    for path in shards:
        with path.open("rb") as file:
            digest.update(file.read(SHARD_HEAD_BYTES))
    state = state | {"_data_files": [{"filename": path.name} for path in shards]}
    state["_fingerprint"] = digest.hexdigest()[:16]
    info.pop("download_checksums", None)
    write_whole(folder / DATASET_INFO, json.dumps(info, indent=2).encode())
    write_whole(folder / DATASET_STATE, json.dumps(state, indent=2, sort_keys=True).encode())


def _load_object(path: StoragePath) -> dict[str, Any]:
    try:
        if isinstance(value := json.loads(path.read_bytes()), dict):
            return value
        raise TypeError(f"got a {type(value).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a json object ({error}); {SAVE}") from error
