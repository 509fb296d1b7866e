"""The gradient of align_rows against a copy of the same bytes, and against the reference."""

from __future__ import annotations

import torch
from harness import ceilings, inputs, table, timing

from realign_fast.ops import reference

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2e-6}


@table.of("align_rows_backward")
def bench_align_rows_backward(line, measure):
    _, device, dtype, columns, count, *_ = line
    rows = inputs.random_rows(dtype, columns, count, device)
    row_map = inputs.random_map(columns, device)
    grad = rows.flip(0)
    some = slice(0, 1000)
    expected = reference.align_rows_backward(rows[some].double(), grad[some], *row_map)

    def error_of(result: torch.Tensor) -> float:
        return float((result[some] - expected).abs().max() / expected.abs().max())

    case = timing.Case(
        **line.facts(),
        bytes=3 * rows.nbytes,
        flops=22 * rows.numel(),
        limit="bytes",
        error_of=error_of,
        tolerance=TOLERANCE[dtype],
        feed=inputs.Rotation(rows),
    )
    backward = torch.ops.realign_fast.align_rows_backward
    case.add("align_rows_backward", lambda rows: backward(rows, grad, *row_map), "ours")
    case.add("copy", ceilings.copy(rows), "ceiling")
    in_torch = lambda rows: reference.align_rows_backward(rows, grad, *row_map)  # noqa: E731
    case.add("plain torch in float64", in_torch, "variant")
    measure(case)
