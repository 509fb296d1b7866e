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
FEW = 1 << 13  # rows for the peers that are slower by far; fewer rows favour them


@pytest.mark.parametrize(("dtype", "dimension"), timing.ROW_CASES, ids=timing.case_name)
def bench_align_rows(dtype, dimension, benchmark, table):
    rows, row_map = timing.random_rows(dtype, dimension), timing.random_map(dimension)
    out = torch.full_like(rows, torch.nan)
    error = peers.align_rows_error(align_rows(rows, *row_map, out=out), rows, row_map)
    assert error <= TOLERANCE[dtype], f"error {error:.1e}: no speed is printed for wrong results"
    case = timing.Case("align_rows", dtype, dimension, 2 * dimension * dtype.itemsize, error)
    case.add("ceiling", len(rows), timing.copy_ceiling(rows))
    case.add("align_rows", len(rows), lambda: align_rows(rows, *row_map, out=out))
    if ops.cpu_isa() == "avx512":
        avx2 = ops.ISA_NAMES.index("avx2")
        into = torch.ops.realign_fast.align_rows_
        case.add("align_rows on AVX2", len(rows), lambda: into(out, rows, *row_map, avx2))
    if dimension == 768:
        few = rows[:FEW].clone()
        compiled = torch.compile(peers.torch_align_rows, dynamic=False)
        exact = torch.compile(reference.align_rows, dynamic=False)
        case.add("torch.compile float32", FEW, lambda: compiled(few, *row_map))
        case.add("torch.compile reference", FEW, lambda: exact(few, *row_map, dtype))
        case.add("torch eager float32", FEW, lambda: peers.torch_align_rows(few, *row_map))
        if dtype != torch.bfloat16:  # numpy has none
            arrays = [part.numpy() for part in (few, *row_map)]
            case.add("numpy float64", FEW, lambda: peers.numpy_align_rows(*arrays))
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(align_rows, (rows, *row_map), {"out": out}, rounds=5, warmup_rounds=1)
