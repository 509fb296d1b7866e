"""align_rows against memcpy of the same bytes, torch.compile, eager torch and numpy float64."""

from __future__ import annotations

import peers
import pytest
import timing
import torch

from realign_fast import align_rows, ops
from realign_fast.ops import reference

# Half an ulp of the row's largest entry; float32 as the README promises it.
TOLERANCE = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6}
SLOW = 3  # rounds for the peers that are slower by far


@pytest.mark.parametrize(("dtype", "dimension"), timing.ROW_CASES, ids=timing.case_name)
def bench_align_rows(dtype, dimension, benchmark, table):
    rows, row_map = timing.random_rows(dtype, dimension), timing.random_map(dimension)
    out = torch.full_like(rows, torch.nan)
    error = peers.align_rows_error(align_rows(rows, *row_map, out=out), rows, row_map)
    assert error <= TOLERANCE[dtype], f"error {error:.1e}: no speed is printed for wrong results"
    case = timing.Case(
        "align_rows", dtype, dimension, 2 * dimension * dtype.itemsize, error, len(rows)
    )
    case.add("ceiling", timing.copy_ceiling(rows))
    case.add("align_rows", lambda: align_rows(rows, *row_map, out=out))
    if ops.cpu_isa() == "avx512":
        avx2 = ops.ISA_NAMES.index("avx2")
        into = torch.ops.realign_fast.align_rows_
        case.add("align_rows on AVX2", lambda: into(out, rows, *row_map, avx2))
    if dimension == 768:
        compiled = torch.compile(peers.torch_align_rows, dynamic=False)
        exact = torch.compile(reference.align_rows, dynamic=False)
        case.add("torch.compile float32", lambda: compiled(rows, *row_map))
        case.add("torch.compile reference", lambda: exact(rows, *row_map, dtype), SLOW)
        case.add("torch eager float32", lambda: peers.torch_align_rows(rows, *row_map), SLOW)
        if dtype != torch.bfloat16:  # numpy has none
            arrays = [part.numpy() for part in (rows, *row_map)]
            case.add("numpy float64", lambda: peers.numpy_align_rows(*arrays), SLOW)
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(align_rows, (rows, *row_map), {"out": out}, rounds=5, warmup_rounds=1)
