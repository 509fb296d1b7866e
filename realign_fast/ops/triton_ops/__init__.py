"""Triton kernels of the ops, for NVIDIA's and AMD's GPUs without a compiled library.

The kernels are in ``row_kernels.py`` and ``product_kernels.py``. These files import triton and are
imported with the first call. Every function here takes the arguments of the function of the same
name in ``reference.py``. The kernels also run without a GPU, on CPU tensors, if
``TRITON_INTERPRET=1`` is set before triton is imported; that is how the tests check them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch


def _import_at_first_call(op: str) -> Callable[..., Any]:
    """Return a function that calls ``op`` and imports its file when it is first called."""

    def call_op(*arguments: Any) -> Any:
        """Call the op of this name in its own file."""
        kernels = importlib.import_module(".product_kernels", __package__)
        return getattr(kernels, op)(*arguments)

    return call_op


add_scatter_ = _import_at_first_call("add_scatter_")
align_rows_ = map_rows_ = _import_at_first_call("map_rows_")
align_rows = map_rows = _import_at_first_call("map_rows")
sum_rows = _import_at_first_call("sum_rows")


def register_kernels(
    library: torch.library.Library, ops: Iterable[str]
) -> tuple[frozenset[str], str]:
    """Register those of the ops that no compiled library implements on the GPUs of this machine.

    ROCm devices are called "cuda" in torch, too.

    Returns:
        The names of the registered ops, and the reason if Triton cannot be used.
    """
    if torch.cuda.device_count() == 0:  # (this queries the driver's library, and starts no driver)
        return frozenset(), "torch sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return frozenset(), "triton is not installed: pip install 'realign_fast[triton]'"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in ops if not has_kernel(f"{library.ns}::{op}", "CUDA")]
    for op in missing:
        library.impl(op, globals()[op], "CUDA")
    return frozenset(missing), ""
