"""The matrix map ``unit(unit(A u + b) + h)`` against the bare product ``X @ A`` it contains."""

from __future__ import annotations

import torch
from harness import ceilings, inputs, table, timing
from peers import row_ops

from realign_fast import align_rows

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2**-8, torch.float32: 4e-6}


@table.of("map_rows")
def bench_map_rows(line, measure):
    _, device, dtype, columns, count, *_ = line
    rows = inputs.random_rows(dtype, columns, count, device)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    matrix = torch.eye(columns, dtype=torch.float64) + 0.3 * noise / columns**0.5
    row_map = (matrix.to(device), *inputs.random_map(columns, device)[1:])
    outs = inputs.Rotation(torch.empty_like(rows))
    case = timing.Case(
        **line.facts(),
        bytes=2 * rows.nbytes,
        flops=2 * count * columns**2,
        limit="flops",
        error_of=lambda result: row_ops.align_rows_error(rows, row_map, result),
        tolerance=TOLERANCE[dtype],
        feed=inputs.Rotation(rows),
    )
    case.add("map_rows", lambda rows: align_rows(rows, *row_map, out=outs()), "ours")
    case.add("product", ceilings.product(row_map[0], count, dtype), "ceiling")
    if device == "cpu":  # torch brings another BLAS
        wide, single, bare = rows.float(), row_map[0].float(), torch.empty(count, columns)
        case.add("torch.mm", lambda _: torch.mm(wide, single, out=bare), "ceiling")
    if line.peers:
        case.add_peers(*row_ops.of_align_rows(row_map, outs, dtype, device, exact=False))
    measure(case)
