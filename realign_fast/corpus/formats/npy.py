"""The `.npy` format: little-endian float16, float32 or float64 `[N, D]` in C order.

The header is checked before the data are touched. No pickle is ever loaded. For the format see
`numpy.lib.format`.
"""

from __future__ import annotations

import io

import numpy as np
import torch

from ...storage.paths import AnyPath, storage_path
from ..shard import FLOATS, MAX_COLUMNS, ContiguousShard, FormatWriter, check_size

HEADER_BYTES = 8192  # no more of a header is ever read; numpy writes 128


class ShardWriter(FormatWriter):
    """Write one `.npy` shard in pieces; see `FormatWriter`.

    >>> with ShardWriter("rows.npy", num_rows=2, dimension=3, dtype=torch.float32) as writer:
    ...     writer.write(torch.zeros(2, 3))
    """

    suffixes = (".npy",)

    def _begin(self) -> None:
        header = {
            "descr": torch.empty(0, dtype=self.dtype).numpy().dtype.str,
            "fortran_order": False,
            "shape": (int(self.num_rows), int(self.dimension)),
        }
        text = io.BytesIO()  # numpy does not see that an unbuffered file took a part of it
        np.lib.format.write_array_header_1_0(text, header)
        self._put(text.getvalue())


class NpyShard(ContiguousShard):
    """One `.npy` file."""

    format = "npy"
    writer_class = ShardWriter


def read_header(path: AnyPath) -> NpyShard:
    """Open the `.npy` shard at `path`; errors are those of `format_registry.read_shard`."""
    path = storage_path(path)
    stamp = path.stamp()
    with path.opened() as file:
        head = io.BytesIO(file.pread(HEADER_BYTES, 0))
    try:
        major, _ = np.lib.format.read_magic(head)
        # Version 3 is version 2 with other field names, and types with fields are refused.
        first, second = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = {1: first, 2: second, 3: second}[major](head)
    except Exception as error:  # hostile text makes the parser raise RecursionError, TypeError...
        raise ValueError(f"{path}: not a .npy file ({error}); write it with numpy.save") from error
    if len(shape) == 1 and dtype.kind in "iuUSO":
        found = f"shape is {shape} of {dtype.str}, expected rows"
        advice = "is this a list of ids? move it out of the folder, or name FOLDER/text.npy"
        raise TypeError(f"{path}: {found}; {advice}")
    if dtype not in FLOATS:
        expected = "expected <f2, <f4 or <f8; save array.astype('<f4')"
        reason = "objects are pickles and never loaded, npy has no bfloat16 (safetensors has)"
        raise TypeError(f"{path}: dtype is {dtype.str}, {expected} ({reason})")
    if len(shape) != 2 or shape[0] < 0 or not 0 < shape[1] < MAX_COLUMNS:
        raise ValueError(f"{path}: shape is {shape}, expected [rows, columns]; reshape and save it")
    if fortran_order:
        raise ValueError(f"{path}: Fortran order, expected C; save numpy.ascontiguousarray(array)")
    offset = head.tell()
    check_size(path, stamp[0], offset + shape[0] * shape[1] * dtype.itemsize)
    return NpyShard(path, int(shape[0]), int(shape[1]), dtype, "", stamp, offset)
