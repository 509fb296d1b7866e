"""The door to the Triton kernels: GPUs for which no compiled library is there, NVIDIA's and AMD's.

The kernels are in three files (``row_kernels.py``, ``scatter_kernels.py``,
``map_kernels.py``), which import triton and are imported with the first call. Every function
here takes the arguments of its twin in ``reference.py``. They also run without a GPU, on CPU
tensors, where ``TRITON_INTERPRET=1`` was set before: that is how the tests check them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

_FILES = {
    "add_scatter_": "scatter_kernels",
    "align_rows": "row_kernels",
    "align_rows_": "row_kernels",
    "map_rows": "map_kernels",
    "map_rows_": "map_kernels",
    "sum_rows": "row_kernels",
}


def _lazily(op: str) -> Callable[..., object]:
    """The op's function, which is imported when it is first called."""

    def call(*arguments, **options):
        module = importlib.import_module(f".{_FILES[op]}", __package__)
        return getattr(module, op)(*arguments, **options)

    call.__name__ = op
    return call


add_scatter_ = _lazily("add_scatter_")
align_rows = _lazily("align_rows")
align_rows_ = _lazily("align_rows_")
map_rows = _lazily("map_rows")
map_rows_ = _lazily("map_rows_")
sum_rows = _lazily("sum_rows")


def register(library: torch.library.Library) -> tuple[frozenset[str], str]:
    """Register what no compiled library answers on GPUs; which ops those are, or why none.

    (ROCm's devices are called "cuda" in torch, too.)
    """
    if torch.cuda.device_count() == 0:  # (which asks the driver's library and starts no driver)
        return frozenset(), "torch sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return frozenset(), "triton is not installed: pip install 'realign_fast[triton]'"
    answered = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [op for op in _FILES if not answered(f"{library.ns}::{op}", "CUDA")]
    for op in ops:
        library.impl(op, globals()[op], "CUDA")
    return frozenset(ops), ""


def benchmark_calls(
    rows: torch.Tensor,  # [N, D] on a GPU
    scale: torch.Tensor,  # [] float64
    shift: torch.Tensor,  # [D] float64
    recentre: torch.Tensor,  # [D] float64
    matrix: torch.Tensor,  # [D, D] float64
) -> dict[str, list[tuple[str, Callable[[], object]]]]:
    """For each op the (name, call) pairs to time; outputs and sums are allocated once, here."""
    columns = rows.shape[1]
    out, wide = torch.empty_like(rows), rows.new_empty(rows.shape, dtype=torch.float32)
    sums = rows.new_zeros(columns, columns, dtype=torch.float64), torch.zeros_like(shift)
    whole, plain = (scale, shift, recentre), (None, None, None)
    diagonal = matrix.diagonal().clone()
    return {
        "align_rows": [
            ("align_rows", lambda: align_rows_(out, rows, *whole)),
            ("align_rows to float32", lambda: align_rows_(wide, rows, *whole)),
        ],
        "sum_rows": [
            ("sum_rows", lambda: sum_rows(rows, *plain, True)),
            ("sum_rows, drift", lambda: sum_rows(rows, scale, shift, None, True)),
            ("sum_rows, as they are", lambda: sum_rows(rows, *plain, False)),
        ],
        "add_scatter_": [
            ("add_scatter_", lambda: add_scatter_(*sums, rows, shift, None, True, False)),
            ("add_scatter_, accurate", lambda: add_scatter_(*sums, rows, shift, None, True, True)),
        ],
        "map_rows": [
            ("map_rows", lambda: map_rows_(out, rows, matrix, shift, recentre)),
            ("map_rows, diagonal", lambda: map_rows_(out, rows, diagonal, shift, recentre)),
        ],
    }
