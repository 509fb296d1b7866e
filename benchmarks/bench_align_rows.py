"""align_rows against memcpy of the same bytes, torch.compile, eager torch, numpy and CuPy.

The kinds "calibrate" and "center-calibrate" are the maps of a SharedSpace, ``(u - mu) / s`` and
``unit(u - mu) / s``, through the object that it maps rows with. The kind "new memory" allocates the
result in every call. Its ceiling copies into a new array of numpy, which asks for huge pages as the
op does, and its variant writes to a new tensor of torch, which does not. The kind "small batch" is
held against ``torch.nn.functional.normalize`` of the same rows.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import ceilings, inputs, table, timing
from peers import row_ops

from realign_fast import align_rows, ops
from realign_fast.shared_space import RoleMap

# Half an ulp of the row's largest entry; float32 as the README promises it.
TOLERANCE = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6}


@table.of("align_rows")
def bench_align_rows(line, measure):
    _, device, dtype, columns, count, kind, *_ = line
    rows = inputs.random_rows(dtype, columns, count, device)
    row_map, length = inputs.random_map(columns, device), 1.0
    ours = lambda rows: align_rows(rows, *row_map, out=outs())  # noqa: E731
    if kind in ("new memory", "small batch"):
        ours = lambda rows: align_rows(rows, *row_map)  # noqa: E731
    elif kind:
        normalized, spread = kind == "center-calibrate", 0.04  # s of CLIP's scores
        length, factor = (1 / spread, 1.0) if normalized else (None, 1 / spread)
        centre = ops.sum_rows(rows).total / count
        role_map = RoleMap(centre, normalized, {0: spread}, columns)
        row_map = torch.full_like(centre[0], factor), -factor * centre, None
        ours = lambda rows: role_map(rows, out=outs())  # noqa: E731
    feed = inputs.Rotation(rows, line.cache)
    outs = inputs.Rotation(torch.full_like(rows, torch.nan), line.cache)
    case = timing.Case(
        **line.facts(),
        bytes=2 * rows.nbytes,
        flops=12 * rows.numel(),
        limit="bytes",
        error_of=lambda result: row_ops.align_rows_error(rows, row_map, result, length),
        tolerance=TOLERANCE[dtype],
        feed=feed,
    )
    case.add("align_rows", ours, "ours")
    if kind == "new memory":
        case.add("clone on huge pages", _clone_on_huge_pages, "ceiling")
        into_small = lambda rows: align_rows(rows, *row_map, out=torch.empty_like(rows))  # noqa: E731
        case.add("align_rows without huge pages", into_small, "variant")
        case.add("clone", torch.clone, "ceiling")
    elif kind == "small batch":
        case.add("normalize", torch.nn.functional.normalize, "ceiling")
    else:
        case.add("copy", ceilings.copy(rows), "ceiling")
    if device == "cpu" and not kind and ops.cpu_instruction_set() == "avx512":
        case.add("align_rows on AVX2", lambda rows: _on_avx2(rows, row_map, outs()), "variant")
    if line.peers:
        case.add_peers(*row_ops.of_align_rows(row_map, outs, dtype, device, line.exact, length))
    measure(case)


def _clone_on_huge_pages(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.empty(rows.shape, np.float16)).copy_(rows)


def _on_avx2(rows, row_map, out) -> torch.Tensor:
    variant = ops.INSTRUCTION_SETS.index("avx2")
    torch.ops.realign_fast.align_rows_(out, rows, *row_map, 1.0, variant)
    return out
