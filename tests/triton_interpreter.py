"""Triton's interpreter, for tests: kernels run on the CPU, program by program, without a GPU.

Importing this sets ``TRITON_INTERPRET``, which must happen before triton is imported, and mends the
interpreter's conversions between bfloat16 and float32: those of triton 3.8 lose the carry of a
significand that rounds up to the next power of two and misread subnormal numbers. The hardware does
neither, so the kernels must not work around it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_own_conversion = interpreter._convert_float


def _convert_float(values, source, target, rounding_mode):
    if source == tl.bfloat16 and target == tl.float32:
        return values.view(np.uint16).astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        wide = torch.from_numpy(np.array(values).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return _own_conversion(values, source, target, rounding_mode)


interpreter._convert_float = _convert_float
