# ruff: noqa: E402  (the environment comes before the imports)
"""Triton's interpreter, for tests: kernels run on the CPU, program by program, without a GPU.

Importing this sets ``TRITON_INTERPRET``, which must happen before triton is imported, and mends the
interpreter's conversions between bfloat16 and float32: those of triton 3.8 lose the carry of a
significand that rounds up to the next power of two and misread subnormal numbers. The hardware does
neither, so the kernels must not work around it.

As a pytest plugin it takes, of the op tests, the cases of the Triton kernels, and of each test two,
the first and the last, since the interpreter needs a second for some; ``--triton-cases 1000`` takes
all. It gives the kernels tiles of more rows: one number takes as long there as a thousand.

    PYTHONPATH=tests pytest -p support.triton_interpreter --triton-cases 1000 \\
        tests/ops/test_align_rows.py
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

from realign_fast.ops.triton_ops import row_kernels

_own_tile = row_kernels.tile


def _tile(columns, crowded=False):
    """16 rows, and blocks so small that 1000 columns are swept in two."""
    own = _own_tile(columns, crowded)
    return own | {"ROWS": 16, "BLOCK": min(own["BLOCK"], 512)}


row_kernels.tile = _tile  # (before the other kernels import it)
TOO_LARGE = (
    "million",
    "threads",
    "caches",
    "no_row_is_lost",
    "far_mean",
    "16384",
    "2500",
)  # thousands of rows, of threads or of columns (1000 columns are swept in two blocks already)


def pytest_addoption(parser):
    parser.addoption("--triton-cases", type=int, default=2, help="of each test; 2 by default")


def pytest_collection_modifyitems(config, items):
    by_test = {}
    for item in items:
        kernels = {"kernel", "compiled_kernel"} & set(item.fixturenames)
        chosen = kernels and item.callspec.params[kernels.pop()] == "triton"
        if chosen and not any(word in item.name for word in TOO_LARGE):
            by_test.setdefault(item.function, []).append(item)
    most = config.getoption("--triton-cases")
    items[:] = [
        cases[round(i * (len(cases) - 1) / max(min(most, len(cases)) - 1, 1))]
        for cases in by_test.values()
        for i in range(min(most, len(cases)))
    ]
