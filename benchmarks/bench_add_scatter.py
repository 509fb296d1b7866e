"""add_scatter_ against the BLAS's ``X.T @ X``: half the products, 0.9 of the peak."""

from __future__ import annotations

import torch
from harness import ceilings, inputs, table, timing
from torch import Tensor

from realign_fast import add_scatter_, ops
from realign_fast.ops import reference

TOLERANCE = {"cpu": 1e-7, "cuda": 1e-6}  # tensor cores cut sums off


@table.of("add_scatter_")
def bench_add_scatter(line, measure):
    _, device, dtype, columns, count, *_ = line
    rows = inputs.random_rows(dtype, columns, count, device)
    centre = rows[:1024].float().mean(dim=0)
    sums = _sums(columns, device)
    truth = _sums(columns, device)
    reference.add_scatter_(*truth, rows, centre.double(), None, True, True)
    case = timing.Case(
        **line.facts(),
        bytes=rows.nbytes,
        flops=count * columns * (columns + 1),
        limit="flops",
        error_of=lambda scatter: float((scatter - truth[0]).norm() / truth[0].norm()),
        tolerance=TOLERANCE[device],
        feed=inputs.Rotation(rows),
    )

    def ours(**options: bool):
        def call(rows: Tensor) -> Tensor:
            add_scatter_(*(one.zero_() for one in sums), rows, centre, **options)
            return sums[0]

        return call

    case.add("add_scatter_", ours(), "ours")
    case.add("product", ceilings.symmetric_product, "ceiling")
    if columns == 768 or device == "cuda":
        case.add("accurate=True", ours(accurate=True), "variant")
    if device == "cuda":
        case.add("fast=True", ours(fast=True), "variant", tolerance=1e-4)
    elif ops.cpu_instruction_set() == "avx512" and columns == 768:
        case.add("add_scatter_ on AVX2", lambda rows: _on_avx2(sums, rows, centre), "variant")
    measure(case)


def _sums(columns: int, device: str) -> tuple[Tensor, Tensor]:
    kind = {"dtype": torch.float64, "device": device}
    return torch.zeros(columns, columns, **kind), torch.zeros(columns, **kind)


def _on_avx2(sums: tuple[Tensor, Tensor], rows: Tensor, centre: Tensor) -> Tensor:
    zeroed, avx2 = [one.zero_() for one in sums], ops.INSTRUCTION_SETS.index("avx2")
    op = torch.ops.realign_fast.add_scatter_
    op(*zeroed, rows, centre.double(), None, True, False, avx2)
    return sums[0]
