"""sum_rows against reading the same bytes, torch.compile, eager torch, numpy and CuPy."""

from __future__ import annotations

import torch
from harness import ceilings, inputs, table, timing
from peers import row_ops
from torch import Tensor

from realign_fast import ops, sum_rows
from realign_fast.ops import reference


@table.of("sum_rows")
def bench_sum_rows(line, measure):
    _, device, dtype, columns, count, kind, *_ = line
    rows = inputs.random_rows(dtype, columns, count, device)
    row_map = inputs.random_map(columns, device)[:2] if kind == "drift" else (None, None)
    truth = _truth(rows, row_map)
    case = timing.Case(
        **line.facts(),
        bytes=rows.nbytes,
        flops=(8 if kind == "drift" else 4) * rows.numel(),
        limit="bytes",
        error_of=lambda total: float((total - truth).abs().max() / count),  # of the mean
        tolerance=1e-7,
        feed=inputs.Rotation(rows, line.cache),
    )
    case.add("sum_rows", lambda rows: sum_rows(rows, *row_map).total, "ours")
    case.add("read", ceilings.read, "ceiling")
    if device == "cpu" and ops.cpu_instruction_set() == "avx512":
        op, avx512 = torch.ops.realign_fast.sum_rows, ops.INSTRUCTION_SETS.index("avx512")
        other = lambda rows: op(rows, *row_map, None, True, avx512)[0]  # noqa: E731
        case.add("sum_rows on AVX-512", other, "variant")
    if line.peers and kind == "plain":
        case.add_peers(*row_ops.of_sum_rows(dtype, device, line.exact))
    measure(case)


def _truth(rows: Tensor, row_map: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Return the sum of all rows in float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(1 << 13):
        total += reference.sum_rows(part.double(), *row_map, None, True)[0]
    return total
