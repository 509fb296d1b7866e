"""Triton kernels of ``map_rows``: ``unit(unit(A u + b) + h)``, A a matrix or a diagonal.

The first kernel multiplies a block of rows by A on tensor cores: float16 rows as they are, with A
split into two float16 matrices ``high + low``; bfloat16 and float32 rows in float32 precision
(three TF32 products on NVIDIA, the GPU's own float32 products elsewhere). TF32 alone, which is
Triton's default, keeps three digits. A row kernel then finishes the block. Rows that it cannot
finish (zero, non-finite, too large or small to square, or with a norm that cancels) are *unusual*
and are recomputed in float64 by a third kernel. If the rows or the result are float64, all is
float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_kernels import (
    TRITON_DTYPE,
    aligned,
    check_no_overlap,
    dot_rows,
    kind_of_rows,
    load_rows,
    load_vector,
    on_device_of,
    squarable,
    store_rows,
    tile,
)

_MAP_ENTRIES = 1 << 23  # of A u that are computed at a time, so that they stay in the L2 cache
_PROMOTE_COLUMNS = 1024  # summed on tensor cores before the sum is added to a rounded float32


@triton.jit(do_not_specialize=["row_count", "row_stride"])
def multiply_rows_kernel(
    product,  # [N, WIDTH] M: A x, scaled as A is
    rows,  # [N, D]
    matrix,  # [TERMS, WIDTH, WIDTH], zeros beyond D
    row_count,
    row_stride,
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


@triton.jit
def _linear(
    row,
    product,
    start,
    alive,
    a,
    factor,
    COLUMNS,
    BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,
    M: tl.constexpr,
):
    """Return a block of A u, [ROWS, BLOCK], from the product or by the diagonal."""
    if DIAGONAL:
        x = load_rows(row, start, alive, COLUMNS, BLOCK, M)
        return x * load_vector(a, start, COLUMNS, BLOCK) * factor
    return load_rows(product, start, alive, COLUMNS, BLOCK, M) * factor


@triton.jit(do_not_specialize=["row_count", "row_stride", "out_stride"])
def finish_rows_kernel(
    out,  # [N, D]
    unusual,  # [N] int8: rows that are left to map_rows_directly_kernel
    rows,  # [N, D]
    product,  # [N, WIDTH] M; unread where DIAGONAL
    diagonal,  # [D] M; read where DIAGONAL
    shift,  # b [D] M
    recentre,  # h [D] M
    constants,  # [2] float64: factor of the product, h.h
    row_count,
    row_stride,
    out_stride,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAREFUL_BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    DIAGONAL: tl.constexpr,
    RECENTRE: tl.constexpr,
    M: tl.constexpr,
):
    """Write unit(unit(y / |x| + b) + h) with y = A x.

    A squared norm below an eighth of its terms counts as cancelled, and the row as unusual.
    """
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = number < row_count
    row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
    target = out + tl.multiple_of(number * out_stride, OUT_STEP)
    product += number * WIDTH
    hh = tl.load(constants + 1)
    xx, _, _ = dot_rows(row, alive, shift, recentre, COLUMNS, ROWS, BLOCK, 1, M)
    usual = squarable(xx, M)
    factor = (tl.load(constants) / tl.sqrt(tl.where(usual, xx, 1))).to(M)[:, None]
    yy = tl.zeros([ROWS], tl.float64)
    bb = tl.zeros([ROWS], tl.float64)
    vv = tl.zeros([ROWS], tl.float64)
    vh = tl.zeros([ROWS], tl.float64)
    for start in range(0, COLUMNS, BLOCK):
        y = _linear(row, product, start, alive, diagonal, factor, COLUMNS, BLOCK, DIAGONAL, M)
        b = load_vector(shift, start, COLUMNS, BLOCK)
        v = y + b
        yy += tl.sum(y * y, axis=1).to(tl.float64)
        bb += tl.sum(b * b, axis=1).to(tl.float64)
        vv += tl.sum(v * v, axis=1).to(tl.float64)
        if RECENTRE:
            h = load_vector(recentre, start, COLUMNS, BLOCK)
            vh += tl.sum(v * h, axis=1).to(tl.float64)
    usual = usual & squarable(vv, M) & (vv > (yy + bb) / 8)
    inverse = 1 / tl.sqrt(tl.where(usual, vv, 1))
    qq = 1 + 2 * inverse * vh + hh
    usual = usual & (qq > (1 + hh) / 8)
    gamma = 1 / tl.sqrt(tl.where(usual, qq, 1))
    beta = (gamma * inverse).to(M)[:, None]
    for start in range(0, COLUMNS, BLOCK):
        y = _linear(row, product, start, alive, diagonal, factor, COLUMNS, BLOCK, DIAGONAL, M)
        v = beta * (y + load_vector(shift, start, COLUMNS, BLOCK))
        if RECENTRE:
            v += gamma.to(M)[:, None] * load_vector(recentre, start, COLUMNS, BLOCK)
        store_rows(target, start, alive & usual, v, COLUMNS, BLOCK)
    tl.store(unusual + number, (usual == 0).to(tl.int8), alive)


@triton.jit
def _step(
    row,
    linear,
    shift,
    recentre,
    peak,
    norm,
    half,
    start,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Return BLOCK entries of A u + b (stage 1) or unit(A u + b) + h (2) of a row, in float64."""
    column = start + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    if DIAGONAL:
        x = tl.load(row + column, inside, other=0).to(tl.float64) / peak / norm
        y = x * tl.load(linear + column, inside, other=0)
    else:
        y = tl.zeros([BLOCK], tl.float64)
        for first in range(0, COLUMNS, BLOCK):
            deep = first + tl.arange(0, BLOCK)
            x = tl.load(row + deep, deep < COLUMNS, other=0).to(tl.float64) / peak / norm
            entry = linear + column.to(tl.int64)[:, None] * COLUMNS + deep[None, :]
            mask = inside[:, None] & (deep < COLUMNS)[None, :]
            y += tl.sum(tl.load(entry, mask, other=0) * x[None, :], axis=1)
    y += tl.load(shift + column, inside, other=0)
    if STAGE == 2:
        y = y / half + tl.load(recentre + column, inside, other=0)
    return y


@triton.jit
def _length(
    row,
    linear,
    shift,
    recentre,
    peak,
    norm,
    half,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Return the norm of all entries of `_step`, or 1 if it is 0."""
    squares = tl.full([], 0, tl.float64)
    for start in range(0, COLUMNS, BLOCK):
        y = _step(
            row, linear, shift, recentre, peak, norm, half, start, COLUMNS, BLOCK, DIAGONAL, STAGE
        )
        squares += tl.sum(y * y, axis=0)
    return tl.where(squares > 0, tl.sqrt(squares), 1)


@triton.jit(do_not_specialize=["row_stride", "out_stride"])
def map_rows_directly_kernel(
    out,  # [N, D]
    unusual,  # [N] int8
    rows,  # [N, D]
    linear,  # [D, D] or [D] float64
    shift,  # [D] float64
    recentre,  # [D] float64
    row_stride,
    out_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,
    RECENTRE: tl.constexpr,
):
    """Map one row term by term in float64 if it is unusual."""
    number = tl.program_id(0).to(tl.int64)
    if tl.load(unusual + number) != 0:
        row = rows + number * row_stride
        target = out + number * out_stride
        zero = tl.full([1], 0, tl.int32)
        peaks, _, finites = kind_of_rows(row + zero, zero == 0, COLUMNS, 1, BLOCK)
        peak = tl.max(peaks, axis=0)
        finite = tl.max(finites.to(tl.int32), axis=0) > 0
        squares = tl.full([], 0, tl.float64)
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(row + column, column < COLUMNS, other=0).to(tl.float64) / peak
            squares += tl.sum(x * x, axis=0)
        norm = tl.where(squares > 0, tl.sqrt(squares), 1)
        half = _length(row, linear, shift, recentre, peak, norm, norm, COLUMNS, BLOCK, DIAGONAL, 1)
        last = half
        if RECENTRE:
            last = _length(
                row, linear, shift, recentre, peak, norm, half, COLUMNS, BLOCK, DIAGONAL, 2
            )
        for start in range(0, COLUMNS, BLOCK):
            y = _step(
                row,
                linear,
                shift,
                recentre,
                peak,
                norm,
                half,
                start,
                COLUMNS,
                BLOCK,
                DIAGONAL,
                2 if RECENTRE else 1,
            )
            y = tl.where(finite, y / last, float("nan"))
            store_rows(target + zero, start, zero == 0, y[None, :], COLUMNS, BLOCK)


def map_rows_(
    out: Tensor,  # [N, D]
    rows: Tensor,  # [N, D]
    matrix: Tensor,  # [D, D] float64, or [D], its diagonal
    shift: Tensor,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    variant: int = 0,
) -> None:
    """Compute ``reference.map_rows_`` block by block, with 64 to 128 MiB of working memory."""
    check_no_overlap("map_rows", out, rows)
    count, columns = rows.shape
    if count == 0:
        return
    m = torch.float64 if torch.float64 in (rows.dtype, out.dtype) else torch.float32
    source, row_step = aligned(rows)
    target, out_step = aligned(out)
    if target.data_ptr() == source.data_ptr():
        source = source.clone()  # unusual rows are read again after others are written
    h = torch.zeros_like(shift) if recentre is None else recentre
    factor, pieces = (None, None) if matrix.dim() == 1 else _matrix_terms(matrix, rows.dtype, m)
    constants = torch.stack([torch.ones_like(h[0]) if factor is None else factor, h @ h])
    narrow = [vector.to(m, copy=True) for vector in (shift, h)]
    narrow.insert(0, matrix.to(m) if matrix.dim() == 1 else narrow[0])
    call = _MapCall(row_step, out_step, recentre is not None, m)
    block_rows = max(_MAP_ENTRIES // columns, 128)
    with on_device_of(rows):
        for first in range(0, count, block_rows):
            block = source[first : first + block_rows]
            product = block if pieces is None else _multiply(block, pieces, row_step, m)
            into = target[first : first + block_rows]
            unusual = torch.empty(len(block), dtype=torch.int8, device=rows.device)
            vectors = (product, *narrow, constants)
            _finish(call, into, unusual, block, vectors)
            _map_directly(call, into, unusual, block, (matrix, shift, h))
    if target is not out:
        out.copy_(target)


def map_rows(
    rows: Tensor,
    matrix: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    dtype: torch.dtype,
    variant: int = 0,
) -> Tensor:
    """Compute ``reference.map_rows`` as [N, D] of ``dtype``."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    map_rows_(out, rows, matrix, shift, recentre)
    return out


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


def _multiply(rows: Tensor, pieces: Tensor, row_step: int, m: torch.dtype) -> Tensor:
    """Return A x, scaled as in `_matrix_terms`, [N, WIDTH] of M."""
    if m == torch.float64:
        # For sm_80, sm_90 and sm_100 Triton 3.8 compiles no float64 product of 16-bit operands that
        # are widened in the kernel.
        rows, row_step = aligned(rows.double())
    count, columns = rows.shape
    terms, width, _ = pieces.shape
    product = torch.empty(count, width, dtype=m, device=rows.device)
    shape = product_tile(columns, terms, m)
    grid = (triton.cdiv(columns, shape["TILE"]), triton.cdiv(count, shape["TILE"]))
    multiply_rows_kernel[grid](
        product,
        rows,
        pieces,
        count,
        rows.stride(0),
        COLUMNS=columns,
        WIDTH=width,
        PROMOTE=_PROMOTE_COLUMNS,
        ROW_STEP=row_step,
        TERMS=terms,
        PRECISION=float32_precision() if pieces.dtype == torch.float32 else "ieee",
        M=TRITON_DTYPE[m],
        **shape,
    )
    return product


class _MapCall(NamedTuple):
    """The settings that all blocks of one call of map_rows share."""

    row_step: int  # divides the stride of the rows
    out_step: int  # divides the stride of the result
    recentre: bool
    m: torch.dtype  # dtype of the computation


def _finish(
    call: _MapCall, out: Tensor, unusual: Tensor, rows: Tensor, vectors: tuple[Tensor, ...]
) -> None:
    """Launch finish_rows_kernel; ``vectors`` are its arguments from product to constants."""
    count, columns = rows.shape
    shape = tile(columns, call.m)
    product = vectors[0]
    finish_rows_kernel[(triton.cdiv(count, shape["ROWS"]),)](
        out,
        unusual,
        rows,
        *vectors,
        count,
        rows.stride(0),
        out.stride(0),
        WIDTH=product.shape[1],
        ROW_STEP=call.row_step,
        OUT_STEP=call.out_step,
        DIAGONAL=product is rows,
        RECENTRE=call.recentre,
        M=TRITON_DTYPE[call.m],
        **shape,
    )


def _map_directly(
    call: _MapCall, out: Tensor, unusual: Tensor, rows: Tensor, row_map: tuple[Tensor, ...]
) -> None:
    """Launch map_rows_directly_kernel; ``row_map`` is A or its diagonal, b and h in float64."""
    map_rows_directly_kernel[(len(rows),)](
        out,
        unusual,
        rows,
        *row_map,
        rows.stride(0),
        out.stride(0),
        COLUMNS=rows.shape[1],
        BLOCK=64,
        DIAGONAL=row_map[0].dim() == 1,
        RECENTRE=call.recentre,
    )
