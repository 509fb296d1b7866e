"""A shard in a `.safetensors` file: one tensor `[N, D]`; every other tensor is carried through.

The rows lie in one piece of the file, so they are read as those of a `.npy` file: mapped, not
copied. The result of a shard is its file with other rows: header, metadata and the other tensors
(ids, labels) are copied byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from .npy import MAX_COLUMNS, TORCH_DTYPES, Shard, ShardWriter, explained, opened

MAX_HEADER = 100 << 20  # the limit of the safetensors library
DTYPES = {f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)}
DEFAULT = "embedding"
OTHER_ROWS = 65536  # of other tensors read at a time


@dataclass(frozen=True)
class TensorShard(Shard):
    """One tensor of a `.safetensors` file."""

    name: str
    size: int  # of the file
    file_bytes = property(lambda self: self.size)
    format = "safetensors"

    def parse(self, descriptor: int) -> TensorShard:
        return _parse(descriptor, self.path, self.name)

    @property
    def others(self):
        with opened(self.path, self) as (file, _):
            header, _ = _header(file.fileno(), self.path)
        return self._other_columns if len(header) > 1 else None

    def _other_columns(self) -> Iterator[dict[str, np.ndarray]]:
        """The other tensors as columns, a number of rows at a time."""
        with safe_open(self.path, "numpy") as file:
            names = [name for name in file.keys() if name != self.name]
            slices = {name: file.get_slice(name) for name in names}
            for name, one in slices.items():
                shape = one.get_shape()
                if len(shape) not in (1, 2) or shape[0] != self.rows or one.get_dtype() == "BF16":
                    got = f"tensor {name!r} is {one.get_dtype()} {shape}"
                    want = f"cannot become a column of {self.rows} rows; leave it out of the file"
                    raise ValueError(f"{self.path}: {got}, {want}")
            for begin in range(0, self.rows, OTHER_ROWS):
                end = min(begin + OTHER_ROWS, self.rows)
                yield {name: one[begin:end] for name, one in slices.items()}

    def writer(self, path: Path) -> TensorWriter:
        return TensorWriter(path, self.rows, self.dimension, TORCH_DTYPES[self.dtype], self)


def read_shard(path: Path, column: str | None = None) -> TensorShard:
    with opened(path, parse=lambda file, path: _parse(file, path, column)) as (_, shard):
        return shard


class TensorWriter(ShardWriter):
    """`ShardWriter` for `.safetensors`; of `source` it keeps everything but the rows."""

    suffix = ".safetensors"

    def _begin(self) -> None:
        if self._source:
            self._copy(0, self._source.offset)
            return
        item = self.dtype.itemsize
        entry = {
            "dtype": f"F{8 * item}",
            "shape": [int(self.rows), int(self.dimension)],
            "data_offsets": [0, int(self.rows) * int(self.dimension) * item],
        }
        text = json.dumps({DEFAULT: entry}).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        if one := self._source:
            self._copy(one.offset + one.rows * one.row_bytes, one.size)

    def _copy(self, begin: int, end: int) -> None:
        """Bytes `begin..end` of the source, 1 MiB at a time."""
        with opened(self._source.path, self._source) as (file, _):
            while begin < end:
                data = os.pread(file.fileno(), min(end - begin, 1 << 20), begin)
                if not data:
                    raise ValueError(f"{self._source.path}: truncated while it was copied")
                self._put(data)
                begin += len(data)


def _parse(descriptor: int, path: Path, column: str | None) -> TensorShard:
    header, data = _header(descriptor, path)
    name = _choose(path, header, column)
    entry, size = header[name], os.fstat(descriptor).st_size
    dtype, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in DTYPES:
        want = "expected F16, F32 or F64; save it as one of them"
        raise TypeError(f"{path}: tensor {name!r} is {dtype}, {want}")
    if not _numbers(shape) or len(shape) != 2 or not 0 < shape[1] < MAX_COLUMNS:
        want = "expected [rows, columns]; reshape it, or name another tensor as the column"
        raise ValueError(f"{path}: tensor {name!r} has shape {shape}, {want}")
    length = shape[0] * shape[1] * DTYPES[dtype].itemsize
    if not _numbers(ends) or len(ends) != 2 or ends[1] - ends[0] != length:
        raise ValueError(f"{path}: tensor {name!r} takes {length} bytes, its header says {ends}")
    last = max(data + end for end in _ends(path, header))
    if size != last:
        what = "truncated" if size < last else "longer than its header says"
        raise ValueError(f"{path}: {what}: got {size} bytes, expected {last}; write it again")
    if (data + ends[0]) % DTYPES[dtype].itemsize:
        advice = "save it with the safetensors library"
        raise ValueError(f"{path}: data at byte {data + ends[0]} is not aligned; {advice}")
    return TensorShard(path, shape[0], shape[1], DTYPES[dtype], data + ends[0], name, size)


def _header(descriptor: int, path: Path) -> tuple[dict[str, Any], int]:
    """The tensors of the header, and the byte at which their data begin."""
    with explained(path):
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        text = os.pread(descriptor, length, 8) if 0 < length <= MAX_HEADER else b""
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


def _choose(path: Path, header: dict[str, Any], column: str | None) -> str:
    """The tensor asked for; without a word `embedding`, or the only one there is."""
    name = column or (next(iter(header)) if len(header) == 1 else DEFAULT)
    if name not in header:
        there = ", ".join(f"{key} {entry.get('shape')}" for key, entry in header.items()) or "none"
        raise ValueError(f"{path}: has no tensor {name!r}; choose one as the column, of: {there}")
    return name


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _ends(path: Path, header: dict[str, Any]) -> list[int]:
    """Where each tensor ends, counted from the first byte of data."""
    found = [entry.get("data_offsets") for entry in header.values()]
    if not all(_numbers(one) and len(one) == 2 for one in found):
        raise ValueError(f"{path}: data_offsets are not pairs of numbers; write the file again")
    return [one[1] for one in found]
