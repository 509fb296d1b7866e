"""The `.safetensors` format: one tensor `[N, D]` holds the rows; every other one is a column.

The rows lie in one piece of the file, so they are mapped as those of a `.npy` file. The result of a
shard is its file with other rows: header, metadata and the other tensors (ids, labels) are copied
byte for byte. For the format see github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ...storage.paths import OpenedFile, StoragePath, explained
from ...storage.read_ahead import pieces
from ..shard import (
    MAX_COLUMNS,
    TORCH_DTYPES,
    BFloat16,
    ContiguousShard,
    Dtype,
    FormatWriter,
    check_size,
    selected,
)

MAX_HEADER = 100 << 20  # the limit of the safetensors library
DEFAULT = "embedding"
DTYPES: dict[str, Dtype] = {"BOOL": np.dtype("?"), "BF16": BFloat16()}
for _name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
    DTYPES[f"{_name[0].upper()}{8 * int(_name[1])}"] = np.dtype(f"<{_name}")
NAMES = {TORCH_DTYPES[dtype]: name for name, dtype in DTYPES.items() if dtype in TORCH_DTYPES}


class Tensor(NamedTuple):
    """An entry of the header."""

    dtype: str
    shape: list[int]
    start: int  # byte in the data
    end: int


Header = dict[str, Tensor]  # by name of the tensor


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
            self._copy(source.offset + source.num_rows * source.row_bytes, source.stamp[0])

    def _copy(self, start: int, end: int) -> None:
        with self._source.opened() as file:
            for data in pieces(file.pread, start, end):
                self._put(data)
                start += len(data)
        if start < end:
            raise self._source.changed_error()


class TensorShard(ContiguousShard):
    """One tensor of a `.safetensors` file."""

    format = "safetensors"
    writer_class = TensorWriter

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the other tensors; see `Shard.other_columns`."""
        with self.opened() as file:
            header, data_offset = _header(file, self.path)
            names = selected((name for name in header if name != self.column), only)
            columns = [self._values(file, data_offset, name, header[name]) for name in names]
        for row in zip(*columns, strict=True):
            yield dict(zip(names, row, strict=True))

    def _values(self, file: OpenedFile, offset: int, name: str, tensor: Tensor) -> np.ndarray:
        """Return another tensor, which must have a value or vector for each row."""
        dtype, shape = DTYPES.get(tensor.dtype), tensor.shape
        if not isinstance(dtype, np.dtype) or len(shape) not in (1, 2) or shape[0] != self.num_rows:
            problem = f"cannot become a column of {self.num_rows} rows; leave it out of the file"
            raise ValueError(f"{self.path}: tensor {name!r} is {tensor.dtype} {shape}, {problem}")
        data = b"".join(pieces(file.pread, offset + tensor.start, offset + tensor.end))
        return np.frombuffer(data, dtype).reshape(shape)


def read_shard(path: StoragePath, column: str | None = None) -> TensorShard:
    """Open the tensor `column` of the file; by default `embedding`, or the only tensor there is."""
    stamp = path.stamp()
    with path.opened() as file:
        header, data_offset = _header(file, path)
    name = column or (next(iter(header)) if len(header) == 1 else DEFAULT)
    if name not in header:
        names = ", ".join(f"{key} {entry.shape}" for key, entry in header.items()) or "none"
        raise ValueError(f"{path}: has no tensor {name!r}; choose one as the column, of: {names}")
    tensor = header[name]
    dtype, shape = DTYPES.get(tensor.dtype), tensor.shape
    if dtype not in TORCH_DTYPES:
        expected = "expected F16, BF16, F32 or F64; save it as one of them"
        raise TypeError(f"{path}: tensor {name!r} is {tensor.dtype}, {expected}")
    if len(shape) != 2 or not 0 < shape[1] < MAX_COLUMNS:
        expected = "expected [rows, columns]; reshape it, or name another tensor as the column"
        raise ValueError(f"{path}: tensor {name!r} has shape {shape}, {expected}")
    check_size(path, stamp[0], data_offset + max(entry.end for entry in header.values()))
    offset = data_offset + tensor.start
    return TensorShard(path, shape[0], shape[1], dtype, name, stamp, offset)


def _header(file: OpenedFile, path: StoragePath) -> tuple[Header, int]:
    """Return the tensors of the header, and the offset of their data in the file."""
    with explained(path):
        length = int.from_bytes(file.pread(8, 0), "little")
        text = file.pread(length, 8) if 0 < length <= MAX_HEADER else b""
    try:
        if len(text) != length or not text:
            raise ValueError("its header is cut off or longer than 100 MiB")
        if not isinstance(entries := json.loads(text), dict):
            raise ValueError("its header is no json object")
        entries.pop("__metadata__", None)
        header = {name: _tensor(name, entry) for name, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        advice = "write it with safetensors.torch.save_file"
        raise ValueError(f"{path}: not a .safetensors file ({error}); {advice}") from error
    return header, 8 + length


def _tensor(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict):
        raise ValueError("its header holds other things than tensors")
    dtype, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _is_sizes(shape):
        raise ValueError(f"tensor {name!r} has shape {shape}")
    size = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else None
    if not _is_sizes(ends) or len(ends) != 2 or size not in (None, ends[1] - ends[0]):
        raise ValueError(f"tensor {name!r} takes {size} bytes, its header says {ends}")
    return Tensor(str(dtype), shape, *ends)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value of the header is a list of integers from 0."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
