"""A shard in a `.safetensors` file: one tensor `[N, D]`; every other tensor is carried through.

The rows lie in one piece of the file, so they are read as those of a `.npy` file: mapped, not
copied. The result of a shard is its file with other rows: header, metadata and the other tensors
(ids, labels) are copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, OpenedFile, StoragePath, explained
from .npy import MAX_COLUMNS, TORCH_DTYPES, BFloat16, Shard, ShardWriter, opened

MAX_HEADER = 100 << 20  # the limit of the safetensors library
DTYPES = {f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)} | {"BF16": BFloat16()}
NAMES = {TORCH_DTYPES[dtype]: name for name, dtype in DTYPES.items()}
DEFAULT = "embedding"
OTHERS = {  # of tensors beside the rows, as columns
    f"{kind.upper()}{8 * n}": np.dtype(f"<{kind}{n}")
    for kind, sizes in (("f", (2, 4, 8)), ("i", (1, 2, 4, 8)), ("u", (1, 2, 4, 8)))
    for n in sizes
} | {"BOOL": np.dtype("?")}
OTHER_ROWS = 65536  # of other tensors read at a time


@dataclass(frozen=True)
class TensorShard(Shard):
    """One tensor of a `.safetensors` file."""

    name: str
    size: int  # of the file
    file_bytes = property(lambda self: self.size)
    format = "safetensors"

    def parse(self, file: OpenedFile) -> TensorShard:
        return _parse(file, self.path, self.name)

    @property
    def others(self):
        with opened(self.path, self) as (file, _):
            header, _ = _header(file, self.path)
        return self._other_columns if len(header) > 1 else None

    def _other_columns(self) -> Iterator[dict[str, np.ndarray]]:
        """The other tensors as columns, a number of rows at a time."""
        with opened(self.path, self) as (file, _):
            header, data = _header(file, self.path)
            others = {name: entry for name, entry in header.items() if name != self.name}
            columns = {name: self._column(name, entry) for name, entry in others.items()}
            for first in range(0, self.num_rows, OTHER_ROWS):
                count, chunk = min(OTHER_ROWS, self.num_rows - first), {}
                for name, (dtype, width) in columns.items():
                    row_bytes, begin = dtype.itemsize * width, header[name]["data_offsets"][0]
                    begin += data + first * row_bytes
                    got = b"".join(file.chunks(begin, begin + count * row_bytes))
                    values, flat = np.frombuffer(got, dtype), len(header[name]["shape"]) == 1
                    chunk[name] = values if flat else values.reshape(count, width)
                yield chunk

    def _column(self, name: str, entry: dict[str, Any]) -> tuple[np.dtype, int]:
        """The number type of another tensor, and how many a row has."""
        kind, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if (
            kind in OTHERS
            and _numbers(shape)
            and len(shape) in (1, 2)
            and shape[0] == self.num_rows
        ):
            dtype, width = OTHERS[kind], shape[1] if len(shape) == 2 else 1
            if ends[1] - ends[0] == dtype.itemsize * width * self.num_rows:
                return dtype, width
        want = f"cannot become a column of {self.num_rows} rows; leave it out of the file"
        raise ValueError(f"{self.path}: tensor {name!r} is {kind} {shape}, {want}")

    def writer(self, path: AnyPath) -> TensorWriter:
        return TensorWriter(path, self.num_rows, self.dimension, TORCH_DTYPES[self.dtype], self)


def read_shard(path: StoragePath, column: str | None = None) -> TensorShard:
    with opened(path, parse=lambda file, path: _parse(file, path, column)) as (_, shard):
        return shard


class TensorWriter(ShardWriter):
    """`ShardWriter` for `.safetensors`; of `source` it keeps everything but the rows."""

    suffix = ".safetensors"
    dtypes = tuple(NAMES)

    def _begin(self) -> None:
        if self._source:
            self._copy(0, self._source.offset)
            return
        item = self.dtype.itemsize
        entry = {
            "dtype": NAMES[self.dtype],
            "shape": [int(self.num_rows), int(self.dimension)],
            "data_offsets": [0, int(self.num_rows) * int(self.dimension) * item],
        }
        text = json.dumps({DEFAULT: entry}).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        if one := self._source:
            self._copy(one.offset + one.num_rows * one.row_bytes, one.size)

    def _copy(self, begin: int, end: int) -> None:
        """Bytes `begin..end` of the source."""
        with opened(self._source.path, self._source) as (file, _):
            for data in file.chunks(begin, end):
                self._put(data)
                begin += len(data)
        if begin < end:
            raise ValueError(f"{self._source.path}: truncated while it was copied")


def _parse(file: OpenedFile, path: StoragePath, column: str | None) -> TensorShard:
    header, data = _header(file, path)
    name = _choose(path, header, column)
    entry, size = header[name], file.size
    dtype, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in DTYPES:
        want = "expected F16, BF16, F32 or F64; save it as one of them"
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


def _header(file: OpenedFile, path: StoragePath) -> tuple[dict[str, Any], int]:
    """The tensors of the header, and the byte at which their data begin."""
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


def _choose(path: StoragePath, header: dict[str, Any], column: str | None) -> str:
    """The tensor asked for; without a word `embedding`, or the only one there is."""
    name = column or (next(iter(header)) if len(header) == 1 else DEFAULT)
    if name not in header:
        there = ", ".join(f"{key} {entry.get('shape')}" for key, entry in header.items()) or "none"
        raise ValueError(f"{path}: has no tensor {name!r}; choose one as the column, of: {there}")
    return name


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _ends(path: StoragePath, header: dict[str, Any]) -> list[int]:
    """Where each tensor ends, counted from the first byte of data."""
    found = [entry.get("data_offsets") for entry in header.values()]
    if not all(_numbers(one) and len(one) == 2 for one in found):
        raise ValueError(f"{path}: data_offsets are not pairs of numbers; write the file again")
    return [one[1] for one in found]
