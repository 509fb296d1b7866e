"""sum_rows against reading the same bytes, torch.compile, eager torch and numpy float64."""

from __future__ import annotations

import peers
import pytest
import timing
import torch

from realign_fast import ops, sum_rows
from realign_fast.ops import reference

SLOW = 3  # rounds for the peers that are slower by far


@pytest.mark.parametrize("through", ["plain", "drift"])
@pytest.mark.parametrize(("dtype", "dimension"), timing.ROW_CASES, ids=timing.case_name)
def bench_sum_rows(dtype, dimension, through, benchmark, table):
    rows = timing.random_rows(dtype, dimension)
    row_map = timing.random_map(dimension)[:2] if through == "drift" else (None, None)
    error = _error(rows, row_map)
    assert error <= 1e-7, f"error {error:.1e}: no speed is printed for wrong results"
    case = timing.Case(
        "sum_rows", dtype, dimension, dimension * dtype.itemsize, error, len(rows), through
    )
    case.add("ceiling", timing.read_ceiling(rows))
    case.add("sum_rows", lambda: sum_rows(rows, *row_map))
    if ops.cpu_isa() == "avx512":
        op, avx512 = torch.ops.realign_fast.sum_rows, ops.ISA_NAMES.index("avx512")
        case.add("sum_rows on AVX-512", lambda: op(rows, *row_map, None, True, avx512))
    if through == "plain" and dimension == 768:
        compiled = torch.compile(peers.torch_sum_rows, dynamic=False)
        exact = torch.compile(reference.sum_rows, dynamic=False)
        case.add("torch.compile float32", lambda: compiled(rows))
        case.add("torch.compile reference", lambda: exact(rows, None, None, None, True), SLOW)
        case.add("torch eager float32", lambda: peers.torch_sum_rows(rows), SLOW)
        if dtype != torch.bfloat16:  # numpy has none
            case.add("numpy float64", lambda: peers.numpy_sum_rows(rows.numpy()), SLOW)
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(sum_rows, (rows, *row_map), rounds=5, warmup_rounds=1)


def _error(rows, row_map) -> float:
    """Largest difference of the mean to float64, over all rows."""
    truth = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in rows.split(1 << 13):
        truth += reference.sum_rows(part.double(), *row_map, None, True)[0]
    return float((sum_rows(rows, *row_map).total - truth).abs().max() / len(rows))
