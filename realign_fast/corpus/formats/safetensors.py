"""The `.safetensors` format: one tensor `[N, D]` holds the rows; every other one is a column.

The rows lie in one piece of the file, so they are mapped as those of a `.npy` file. The result of a
shard is its file with other rows: header, metadata and the other tensors (ids, labels) are copied
byte for byte. For the format see github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from ...storage.paths import AnyPath, OpenedFile, StoragePath, explained
from ...storage.read_ahead import pieces
from ..shard import MAX_COLUMNS, TORCH_DTYPES, BFloat16, ContiguousShard
from ..shard_writer import FormatWriter

MAX_HEADER = 100 << 20  # the limit of the safetensors library
DTYPES: dict[str, np.dtype[Any] | BFloat16] = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": BFloat16(),
}
NAMES = {TORCH_DTYPES[dtype]: name for name, dtype in DTYPES.items()}
DEFAULT = "embedding"
COLUMN_DTYPES = {  # of tensors other than the rows
    f"{letter.upper()}{8 * size}": np.dtype(f"<{letter}{size}")
    for letter, sizes in (("f", (2, 4, 8)), ("i", (1, 2, 4, 8)), ("u", (1, 2, 4, 8)))
    for size in sizes
} | {"BOOL": np.dtype("?")}
COLUMN_ROWS = 65536  # of the other tensors read at a time

Header = dict[str, dict[str, Any]]  # by name of the tensor: dtype, shape, data_offsets


@dataclass(frozen=True)
class TensorShard(ContiguousShard):
    """One tensor of a `.safetensors` file."""

    name: str
    size: int  # of the file in bytes

    format = "safetensors"

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return self.size

    def parse(self, file: OpenedFile) -> TensorShard:
        """Return the shard that the header of `file` describes now."""
        return _parse(file, self.path, self.name)

    @property
    def has_other_columns(self) -> bool:
        """True if the file has other tensors than the rows."""
        with self.opened() as file:
            return len(_header(file, self.path)[0]) > 1

    def other_columns(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the other tensors as columns, `COLUMN_ROWS` rows at a time."""
        with self.opened() as file:
            header, data_offset = _header(file, self.path)
            columns = {
                name: self._column(name, entry)
                for name, entry in header.items()
                if name != self.name
            }
            for first in range(0, self.num_rows, COLUMN_ROWS):
                count, chunk = min(COLUMN_ROWS, self.num_rows - first), {}
                for name, (dtype, row_shape, offset) in columns.items():
                    row_bytes = dtype.itemsize * math.prod(row_shape)
                    start = data_offset + offset + first * row_bytes
                    data = b"".join(pieces(file.pread, start, start + count * row_bytes))
                    chunk[name] = np.frombuffer(data, dtype).reshape(count, *row_shape)
                yield chunk

    def _column(
        self, name: str, entry: dict[str, Any]
    ) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        """Return number type, shape of a row and offset in the data of another tensor."""
        dtype_name, shape, ends = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
        dtype = COLUMN_DTYPES.get(str(dtype_name))
        if dtype is not None and _is_sizes(shape) and len(shape) in (1, 2):
            size = dtype.itemsize * math.prod(shape)
            if shape[0] == self.num_rows and ends[1] - ends[0] == size:
                return dtype, tuple(shape[1:]), ends[0]
        problem = f"cannot become a column of {self.num_rows} rows; leave it out of the file"
        raise ValueError(f"{self.path}: tensor {name!r} is {dtype_name} {shape}, {problem}")

    def writer(self, path: AnyPath) -> TensorWriter:
        """Return a writer for a copy of the file with other rows."""
        return TensorWriter(path, self.num_rows, self.dimension, self.torch_dtype, self)


class TensorWriter(FormatWriter):
    """Write a `.safetensors` shard; of `source` it keeps everything but the rows."""

    suffixes = (".safetensors",)
    dtypes = tuple(NAMES)

    def _begin(self) -> None:
        if self._source:
            self._copy(0, self._source.offset)
            return
        entry = {
            "dtype": NAMES[self.dtype],
            "shape": [int(self.num_rows), int(self.dimension)],
            "data_offsets": [0, int(self.num_rows) * int(self.dimension) * self.dtype.itemsize],
        }
        text = json.dumps({DEFAULT: entry}).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        if source := self._source:
            self._copy(source.offset + source.num_rows * source.row_bytes, source.size)

    def _copy(self, start: int, end: int) -> None:
        """Copy the bytes `start..end` of the source."""
        with self._source.opened() as file:
            for data in pieces(file.pread, start, end):
                self._put(data)
                start += len(data)
        if start < end:
            raise ValueError(f"{self._source.path}: truncated while it was copied")


def recognizes(head: bytes) -> bool:
    """Return whether a file that begins with `head` may be a `.safetensors` file."""
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= MAX_HEADER


def read_shard(path: StoragePath, column: str | None = None) -> TensorShard:
    """Open the tensor `column` of the file; by default `embedding`, or the only tensor there is."""
    with path.opened() as file:
        return _parse(file, path, column)


def _parse(file: OpenedFile, path: StoragePath, column: str | None) -> TensorShard:
    header, data_offset = _header(file, path)
    name = _choose(path, header, column)
    entry, size = header[name], file.size
    dtype_name, shape, ends = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype_name not in DTYPES:
        expected = "expected F16, BF16, F32 or F64; save it as one of them"
        raise TypeError(f"{path}: tensor {name!r} is {dtype_name}, {expected}")
    if not _is_sizes(shape) or len(shape) != 2 or not 0 < shape[1] < MAX_COLUMNS:
        expected = "expected [rows, columns]; reshape it, or name another tensor as the column"
        raise ValueError(f"{path}: tensor {name!r} has shape {shape}, {expected}")
    dtype = DTYPES[dtype_name]
    length = shape[0] * shape[1] * dtype.itemsize
    if not _is_sizes(ends) or len(ends) != 2 or ends[1] - ends[0] != length:
        raise ValueError(f"{path}: tensor {name!r} takes {length} bytes, its header says {ends}")
    expected_size = data_offset + max(_tensor_ends(path, header))
    if size != expected_size:
        state = "truncated" if size < expected_size else "longer than its header says"
        sizes = f"got {size} bytes, expected {expected_size}"
        raise ValueError(f"{path}: {state}: {sizes}; write it again")
    offset = data_offset + ends[0]
    if offset % dtype.itemsize:
        advice = "save it with the safetensors library"
        raise ValueError(f"{path}: data at byte {offset} is not aligned; {advice}")
    return TensorShard(path, shape[0], shape[1], dtype, offset, name, size)


def _header(file: OpenedFile, path: StoragePath) -> tuple[Header, int]:
    """Return the tensors of the header, and the offset of their data in the file."""
    with explained(path):
        length = int.from_bytes(file.pread(8, 0), "little")
        text = file.pread(length, 8) if 0 < length <= MAX_HEADER else b""
    try:
        if len(text) != length or not text:
            raise ValueError("its header is cut off or longer than 100 MiB")
        header = json.loads(text)
        header.pop("__metadata__", None)
        if not all(isinstance(entry, dict) for entry in header.values()):
            raise ValueError("its header holds other things than tensors")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        advice = "write it with safetensors.torch.save_file"
        raise ValueError(f"{path}: not a .safetensors file ({error}); {advice}") from error
    return header, 8 + length


def _choose(path: StoragePath, header: Header, column: str | None) -> str:
    """Return the name of the tensor of the rows."""
    name = column or (next(iter(header)) if len(header) == 1 else DEFAULT)
    if name not in header:
        names = ", ".join(f"{key} {entry.get('shape')}" for key, entry in header.items()) or "none"
        raise ValueError(f"{path}: has no tensor {name!r}; choose one as the column, of: {names}")
    return name


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value of the header is a list of integers from 0."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _tensor_ends(path: StoragePath, header: Header) -> list[int]:
    """Return the end of each tensor, in bytes from the first byte of data."""
    ends = []
    for entry in header.values():
        offsets = entry.get("data_offsets")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{path}: data_offsets are not pairs of numbers; write the file again")
        ends.append(offsets[1])
    return ends
