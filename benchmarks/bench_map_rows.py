"""The matrix map ``unit(unit(A u + b) + h)`` against the bare product ``X @ A`` it contains."""

from __future__ import annotations

import numpy as np
import peers
import pytest
import timing
import torch

from realign_fast import align_rows
from realign_fast.ops import reference

ROWS = 1 << 16
ROUNDS = 5
SLOW = 3
CASES = [(d, n) for d in (torch.float32, torch.float16) for n in (512, 768, 1024, 1280)]


@pytest.mark.parametrize(("dtype", "dimension"), CASES, ids=timing.case_name)
def bench_map_rows(dtype, dimension, benchmark, table):
    rows = timing.random_rows(dtype, dimension, ROWS)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    matrix = torch.eye(dimension, dtype=torch.float64) + 0.3 * noise / dimension**0.5
    row_map = (matrix, *timing.random_map(dimension)[1:])
    out = torch.empty_like(rows)
    align_rows(rows, *row_map, out=out)
    truth = reference.map_rows(rows[::37].double(), *row_map, torch.float64)
    error = float(
        ((out[::37].double() - truth) / truth.abs().amax(dim=1, keepdim=True)).abs().max()
    )
    assert error <= (1e-3 if dtype == torch.float16 else 4e-6), f"error {error:.1e}: no speed"
    case = timing.Case(
        "map_rows",
        dtype,
        dimension,
        2 * dimension * dtype.itemsize,
        error,
        ROWS,
        row_flops=2 * dimension**2,
    )
    wide, single = rows.float(), matrix.float()
    product = torch.empty(ROWS, dimension)
    arrays = wide.numpy(), single.numpy(), product.numpy()
    case.add("ceiling", lambda: np.matmul(arrays[0], arrays[1], out=arrays[2]), ROUNDS)
    case.add("map_rows", lambda: align_rows(rows, *row_map, out=out), ROUNDS)
    case.add("bare torch.mm", lambda: torch.mm(wide, single, out=product), SLOW)
    if dimension == 768:
        case.add("torch eager float32", lambda: peers.torch_map_rows(rows, *row_map), SLOW)
        compiled = torch.compile(peers.torch_map_rows, dynamic=False)
        case.add("torch.compile float32", lambda: compiled(rows, *row_map), SLOW)
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(align_rows, (rows, *row_map), {"out": out}, rounds=1)
