"""The peers of the row ops and of the matrix map, each through its fastest public path.

What is written in numpy or eager torch goes through blocks of 512 rows into a result that lies
ready: 3 to 8 times as fast as whole arrays, whose temporaries leave the caches and cost page
faults. A compiled function writes into that result too. CuPy takes all rows of a GPU at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from peers import packages
from realign_fast.ops import reference

BLOCK_ROWS = 512
# s [] or A [D, D], b [D] and h [D] or None, float64
RowMap = tuple[Tensor, Tensor, Tensor | None]


def torch_align_rows(
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    length: float | None = 1.0,
) -> Tensor:
    """Return ``c unit(unit(s u + b) + h)`` in float32, rounded to the rows' dtype; s may be A."""
    u = normalize(rows.float(), dim=1)
    mapped = (u @ scale.float().T if scale.dim() else scale.float() * u) + shift.float()
    if recentre is not None:
        mapped = normalize(mapped, dim=1) + recentre.float()
    if length is not None:
        mapped = normalize(mapped, dim=1)
    return (mapped if length in (None, 1) else length * mapped).to(rows.dtype)


def torch_sum_rows(rows: Tensor) -> Tensor:
    """Return the sum of the rows' directions, normalized in float32 and added in float64."""
    return normalize(rows.float(), dim=1).sum(dim=0, dtype=torch.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows of length one, in numpy or CuPy."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def array_align_rows(rows, scale, shift, recentre, length=1.0) -> np.ndarray:
    """Return ``c unit(unit(s u + b) + h)`` in the precision of the map, in numpy or CuPy."""
    u = unit(rows.astype(shift.dtype))
    mapped = (u @ scale.T if scale.ndim else scale * u) + shift
    if recentre is not None:
        mapped = unit(mapped) + recentre
    if length is not None:
        mapped = unit(mapped)
    return mapped if length in (None, 1) else length * mapped


def of_align_rows(
    row_map: RowMap,
    out: Callable[[], Tensor],
    dtype: torch.dtype,
    device: str,
    exact: bool,
    length: float | None = 1.0,
) -> packages.Found:
    """Return the peers that map rows by ``row_map`` into ``out()``; ``exact`` adds float64."""

    def assign(into: Tensor, rows: Tensor) -> None:
        into.copy_(torch_align_rows(rows, *row_map, length))

    def assign_exactly(into: Tensor, rows: Tensor) -> None:
        of = reference.map_rows if row_map[0].dim() else reference.align_rows
        into.copy_(of(rows, *row_map, dtype, length))

    def whole(function: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], Tensor]:
        def call(rows: Tensor) -> Tensor:
            result = out()
            function(result, rows)
            return result

        return call

    def in_blocks(into: Tensor, rows: Tensor) -> None:
        for place, part in zip(into.split(BLOCK_ROWS), rows.split(BLOCK_ROWS), strict=True):
            assign(place, part)

    def in_numpy(into: Tensor, rows: Tensor) -> None:
        arrays = [one if one is None else one.numpy() for one in row_map]
        for place, part in zip(into.split(BLOCK_ROWS), rows.split(BLOCK_ROWS), strict=True):
            place.numpy()[:] = array_align_rows(part.numpy(), *arrays, length)

    def in_cupy(into: Tensor, rows: Tensor) -> None:
        import cupy

        arrays = [one if one is None else cupy.from_dlpack(one.float()) for one in row_map]
        cupy.from_dlpack(into)[:] = array_align_rows(cupy.from_dlpack(rows), *arrays, length)

    compiled = {"torch.compile float32": assign} | (
        {"torch.compile float64": assign_exactly} if exact else {}
    )
    return _found(compiled, whole, in_blocks, in_numpy, in_cupy, dtype, device)


def of_sum_rows(dtype: torch.dtype, device: str, exact: bool) -> packages.Found:
    """Return the peers that sum the rows' directions."""

    def exactly(rows: Tensor) -> Tensor:
        return reference.sum_rows(rows, None, None, None, True)[0]

    def in_blocks(rows: Tensor) -> Tensor:
        return torch.stack([torch_sum_rows(part) for part in rows.split(BLOCK_ROWS)]).sum(dim=0)

    def in_numpy(rows: Tensor) -> Tensor:
        total = np.zeros(rows.shape[1])
        for part in rows.split(BLOCK_ROWS):
            total += unit(part.numpy().astype(np.float64)).sum(axis=0)
        return torch.from_numpy(total)

    def in_cupy(rows: Tensor) -> Tensor:
        import cupy

        return torch.from_dlpack(unit(cupy.from_dlpack(rows).astype("float32")).sum(axis=0))

    compiled = {"torch.compile float32": torch_sum_rows} | (
        {"torch.compile float64": exactly} if exact else {}
    )
    return _found(compiled, lambda call: call, in_blocks, in_numpy, in_cupy, dtype, device)


def _found(compiled, whole, in_blocks, in_numpy, in_cupy, dtype, device) -> packages.Found:
    """Return the peers that are available on this device for this dtype."""
    name = f"torch {torch.__version__}"
    found, missing = {f"torch eager float32 ({name})": whole(in_blocks)}, []
    for what, function in compiled.items():
        if packages.COMPILE:
            found[f"{what} ({name})"] = whole(torch.compile(function, dynamic=False))
        else:
            missing.append(f"{what} (left out: --no-compile)")
    if device == "cuda":
        cupy, absent = packages.installed({"CuPy float32": ("cupy", "cupy", whole(in_cupy))})
        return found | cupy, missing + absent
    if dtype == torch.bfloat16:
        return found, [*missing, "numpy float64 (numpy has no bfloat16)"]
    return found | {f"numpy float64 (numpy {np.__version__})": whole(in_numpy)}, missing


def align_rows_error(
    rows: Tensor, row_map: RowMap, result: Tensor, length: float | None = 1.0
) -> float:
    """Return the largest relative difference to float64 on 2000 rows that are spread over all."""
    sample = slice(None, None, max(1, len(rows) // 2000))
    of = reference.map_rows if row_map[0].dim() else reference.align_rows
    truth = of(rows[sample].double(), *row_map, torch.float64, length)
    difference = (result[sample].double() - truth).abs()
    return float((difference / truth.abs().amax(dim=1, keepdim=True)).max())
