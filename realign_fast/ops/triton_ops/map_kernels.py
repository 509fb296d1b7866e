"""Triton kernels of ``map_rows``: ``unit(unit(A u + b) + h)``, A a matrix or a diagonal.

The first kernel multiplies a block of rows by A on tensor cores: float16 rows as they are, with A
split into two float16 matrices ``high + low``; bfloat16 and float32 rows in float32 precision
(three TF32 products on NVIDIA, the GPU's own float32 products elsewhere). TF32 alone, which is
Triton's default, keeps three digits. ``align_rows_kernel`` (``row_kernels.py``) then finishes the
block, its *unusual* rows from the beginning and in float64. If the rows or the result are float64,
all is float64. A diagonal needs no product, and ``align_rows_kernel`` does it all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import check_no_overlap
from .row_kernels import (
    align_rows_,
    align_rows_kernel,
    aligned,
    ending,
    launch,
    step_of,
    tile,
)

_MAP_ENTRIES = 1 << 23  # of A u that are computed at a time, so that they stay in the L2 cache
_PROMOTE_COLUMNS = 1024  # summed on tensor cores before the sum is added to a rounded float32


@triton.jit(do_not_specialize=["row_count", "row_stride"])
def multiply_rows_kernel(
    rows,  # [N, D]
    row_count,
    row_stride,
    product,  # [N, WIDTH] M: A x, scaled as A is
    matrix,  # [TERMS, WIDTH, WIDTH], zeros beyond D
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PROMOTE: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
):
    """Multiply a tile of TILE rows by TILE rows of A."""
    number = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    alive = number < row_count
    row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
    column = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    total = tl.zeros([TILE, TILE], M)
    for group in range(0, COLUMNS, PROMOTE):
        part = tl.zeros([TILE, TILE], M)
        for start in range(group, min(group + PROMOTE, COLUMNS), DEPTH):
            deep = start + tl.arange(0, DEPTH)
            mask = alive[:, None] & (deep < COLUMNS)[None, :]
            x = tl.load(row[:, None] + deep[None, :], mask, other=0)
            entry = matrix + column[None, :] * WIDTH + deep[:, None]
            a = tl.load(entry)
            part = tl.dot(x.to(a.dtype), a, part, input_precision=PRECISION)
            if TERMS == 2:
                part = tl.dot(x.to(a.dtype), tl.load(entry + WIDTH * WIDTH), part)
        total += part
    target = product + number[:, None] * WIDTH + column[None, :]
    tl.store(target, total, alive[:, None] & (column < WIDTH)[None, :])


def map_rows_(
    out: Tensor,  # [N, D]
    rows: Tensor,  # [N, D]
    matrix: Tensor,  # [D, D] float64, or [D], its diagonal
    shift: Tensor,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    length: float | None = 1.0,
    variant: int = 0,
) -> None:
    """Compute ``reference.map_rows_`` block by block, with 64 to 128 MiB of working memory."""
    check_no_overlap("map_rows", out, rows)
    if matrix.dim() == 1:
        return align_rows_(out, rows, matrix, shift, recentre, length)
    columns = rows.shape[1]
    m = torch.float64 if torch.float64 in (rows.dtype, out.dtype) else torch.float32
    source, target = aligned(rows), aligned(out)
    in_place = target.data_ptr() == source.data_ptr()
    factor, pieces = _matrix_terms(matrix, rows.dtype, m)
    vectors, constants = ending(shift, recentre, length)
    block_rows = max(_MAP_ENTRIES // columns, 128)
    shape = tile(columns)
    for block, into in zip(source.split(block_rows), target.split(block_rows), strict=True):
        product = _multiply(block, pieces, m)
        if in_place:
            block = block.clone()  # an unusual row is read to the end for each of its blocks
        launch(
            align_rows_kernel,
            (triton.cdiv(len(block), shape["ROWS"]),),
            block,
            m,
            *(into, into.stride(0), product, factor, matrix, *vectors),
            OUT_STEP=step_of(into),
            WIDTH=product.shape[1],
            DIMS=2,
            **constants,
            **shape,
        )
    if target is not out:
        out.copy_(target)


def product_tile(columns: int, terms: int, m: torch.dtype) -> dict[str, int]:
    """Return TILE, DEPTH, warps and stages; operands of 3 stages fit 99 KiB of shared memory."""
    if m == torch.float64:
        return {"TILE": 64, "DEPTH": 16, "num_warps": 4, "num_stages": 3}
    if terms == 1 or columns <= 64:
        return {"TILE": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 3}
    return {"TILE": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 3}


def float32_precision() -> str:
    """Return the input precision that keeps nearly all digits of float32 on GPUs of this vendor."""
    return "ieee" if torch.version.hip else "tf32x3"


def _matrix_terms(matrix: Tensor, dtype: torch.dtype, m: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factor of the product, [] float64, and A in full tiles, [TERMS, WIDTH, WIDTH]."""
    columns = len(matrix)
    width = triton.cdiv(columns, 128) * 128
    wide = torch.nn.functional.pad(matrix, (0, width - columns, 0, width - columns))
    if dtype != torch.float16 or m == torch.float64:
        return torch.ones_like(matrix[0, 0]), wide.to(m)[None]
    exponent = torch.frexp(matrix.abs().amax()).exponent - 15  # to the upper end of float16
    scaled = torch.ldexp(wide, -exponent)
    high = scaled.half()
    low = (scaled - high.double()).half()
    return torch.ldexp(torch.ones_like(matrix[0, 0]), exponent), torch.stack([high, low])


def _multiply(rows: Tensor, pieces: Tensor, m: torch.dtype) -> Tensor:
    """Return A x, scaled as in `_matrix_terms`, [N, WIDTH] of M."""
    if m == torch.float64:
        # For sm_80, sm_90 and sm_100 Triton 3.8 compiles no float64 product of 16-bit operands that
        # are widened in the kernel.
        rows = aligned(rows.double())
    count, columns = rows.shape
    terms, width, _ = pieces.shape
    product = torch.empty(count, width, dtype=m, device=rows.device)
    shape = product_tile(columns, terms, m)
    launch(
        multiply_rows_kernel,
        (triton.cdiv(columns, shape["TILE"]), triton.cdiv(count, shape["TILE"])),
        rows,
        m,
        product,
        pieces,
        WIDTH=width,
        PROMOTE=_PROMOTE_COLUMNS,
        TERMS=terms,
        PRECISION=float32_precision() if pieces.dtype == torch.float32 else "ieee",
        **shape,
    )
    return product
