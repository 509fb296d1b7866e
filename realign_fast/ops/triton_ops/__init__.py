"""Triton kernels of the ops, for NVIDIA's and AMD's GPUs without a compiled library.

The kernels are in ``row_kernels.py`` and ``product_kernels.py``. These files import triton and are
imported when an op of this module is first asked for. Every op takes the arguments of the function
of the same name in ``reference.py``. The kernels also run without a GPU, on CPU tensors, if
``TRITON_INTERPRET=1`` is set before triton is imported; that is how the tests check them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch


def __getattr__(op: str) -> Any:
    """Return an op by name; a number in place of the matrix needs no other function."""
    if op.startswith("_"):
        raise AttributeError(op)
    name = op if op.endswith("backward") else op.replace("align_", "map_")
    file = ".product_kernels" if name.startswith(("map_", "add_")) else ".row_kernels"
    return getattr(importlib.import_module(file, __package__), name)


def why_not() -> str:
    """Return why the Triton kernels cannot run, or "" if they can; ROCm is called CUDA in torch."""
    if torch.cuda.device_count() == 0:  # (this queries the driver's library, and starts no driver)
        return "torch sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'realign_fast[triton]'"
    return ""
