"""Triton kernels of the ops, for NVIDIA's and AMD's GPUs without a compiled library.

The kernels are in ``row_kernels.py``, ``scatter_kernels.py`` and ``map_kernels.py``. These files
import triton and are imported with the first call. Every function here takes the arguments of the
function of the same name in ``reference.py``. The kernels also run without a GPU, on CPU tensors,
if ``TRITON_INTERPRET=1`` is set before triton is imported; that is how the tests check them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

_FILES = {
    "add_scatter_": "scatter_kernels",
    "align_rows": "row_kernels",
    "align_rows_": "row_kernels",
    "map_rows": "map_kernels",
    "map_rows_": "map_kernels",
    "sum_rows": "row_kernels",
}


def _import_at_first_call(op: str) -> Callable[..., Any]:
    """Return a function that calls ``op`` and imports its file when it is first called."""

    def call_op(*arguments: Any, **options: Any) -> Any:
        """Call the op of this name in its own file."""
        module = importlib.import_module(f".{_FILES[op]}", __package__)
        return getattr(module, op)(*arguments, **options)

    call_op.__name__ = op
    return call_op


add_scatter_ = _import_at_first_call("add_scatter_")
align_rows = _import_at_first_call("align_rows")
align_rows_ = _import_at_first_call("align_rows_")
map_rows = _import_at_first_call("map_rows")
map_rows_ = _import_at_first_call("map_rows_")
sum_rows = _import_at_first_call("sum_rows")


def register_kernels(library: torch.library.Library) -> tuple[frozenset[str], str]:
    """Register the ops that no compiled library implements on the GPUs of this machine.

    ROCm devices are called "cuda" in torch, too.

    Returns:
        The names of the registered ops, and the reason if Triton cannot be used.
    """
    if torch.cuda.device_count() == 0:  # (this queries the driver's library, and starts no driver)
        return frozenset(), "torch sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return frozenset(), "triton is not installed: pip install 'realign_fast[triton]'"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [op for op in _FILES if not has_kernel(f"{library.ns}::{op}", "CUDA")]
    for op in ops:
        library.impl(op, globals()[op], "CUDA")
    return frozenset(ops), ""
