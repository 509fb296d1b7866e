"""Arrow IPC files and streams, and the data of Hugging Face datasets.

A local file is mapped. A batch of rows is copied out of the map, and the mapped pages are released
every `RELEASE_BYTES`, so memory is bounded whatever the size of the record batches (compressed ones
are decompressed whole). From a URL record batches are fetched one after the other.

Opening a file counts its rows: pyarrow goes through its record batches, which for a mapped file
touches their heads alone. A compressed file is decompressed for it, and of a remote file the column
of rows is fetched, of a remote stream everything.

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
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from ...storage.paths import StoragePath, explained, write_whole
from ..io_extension import io as _io
from . import arrow_columns as tables

MAGIC = b"ARROW1"
PIECE_BYTES, RELEASE_BYTES = 4 << 20, 16 << 20
DATASET_STATE, DATASET_INFO = "state.json", "dataset_info.json"
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


class ArrowShard(tables.TableShard):
    """One column of an Arrow IPC file."""

    format = "arrow"
    writer_class = ArrowWriter

    def record_batches(self, names: list[str], first: int = 0) -> Iterator[Any]:
        """Yield columns from row `first` on, in views of the mapped record batches."""
        step, start, unreleased = max(1, PIECE_BYTES // self.row_bytes), 0, 0
        with _opened_data(self.path) as data:
            for batch in _record_batches(data, names):
                columns = enumerate(batch.schema.names)  # two columns may have one name
                batch = batch.select([place for place, name in columns if name in names])
                for row in range(max(0, first - start), len(batch), step):
                    if isinstance(data, mmap.mmap) and self.path.stamp()[0] != len(data):
                        raise self.changed_error()  # touching a page that is gone would be a SIGBUS
                    yield batch.slice(row, step)
                    unreleased += PIECE_BYTES
                    if isinstance(data, mmap.mmap) and unreleased >= RELEASE_BYTES:
                        data.madvise(mmap.MADV_DONTNEED)
                        unreleased = 0
                start += len(batch)


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
            path, reader.schema, column, lambda name: _record_batches(data, [name])
        )
        num_rows = sum(map(len, _record_batches(data, [vectors[2]])))
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


def _open_reader(data: Data, names: Collection[str] = ()) -> Any:
    """Return a reader of record batches.

    A remote file is read without other columns than `names`, if some are given. (A reader of one
    column of a mapped file would copy it.)
    """
    pa = tables.pyarrow()
    data.seek(0)
    open_data = pa.ipc.open_file if data.read(len(MAGIC)) == MAGIC else pa.ipc.open_stream
    data.seek(0)
    if isinstance(data, mmap.mmap):
        return open_data(pa.py_buffer(data))
    reader = open_data(data)
    if not names or _is_stream(reader):
        return reader
    included = [place for place, name in enumerate(reader.schema.names) if name in names]
    options = pa.ipc.IpcReadOptions(included_fields=included)
    data.seek(0)
    return open_data(data, options=options)


def _is_stream(reader: Any) -> bool:
    return isinstance(reader, tables.pyarrow().ipc.RecordBatchStreamReader)


def _record_batches(data: Data, names: Collection[str]) -> Iterator[Any]:
    reader = _open_reader(data, names)
    if _is_stream(reader):
        return iter(reader)
    return map(reader.get_batch, range(reader.num_record_batches))


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
