"""Triton kernels of ``align_rows``, its gradient and ``sum_rows``, and what all row kernels share.

A program processes a tile of `ROWS` rows and `BLOCK` columns at a time; a row longer than BLOCK is
read block by block. ``unit(unit(A u + b) + h)``, with A a number or a diagonal, is computed term by
term. Each of its lengths needs a sweep over the row, and all sweeps after the first find the row in
registers or in a cache. Rows for which a sum cancels, and rows that are zero, non-finite or too
large or small to square, are *unusual*: they are recomputed in float64 (`EXACT`).

Tiles, and therefore the order of every sum, depend on D alone: memory that is not aligned to 16
bytes is copied first instead of being read in other steps. So a row has the same bytes whatever
rows surround it, and a sum has the same bytes in every run.

The kernels name their tensors as the formulas do: ``M`` is the dtype they compute in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ENTRIES = 4096
_ENTRIES_OF_A_WARP = 512  # 16 for each thread, which is as many as float64 leaves registers for
_MOST_ROWS = 4  # of a tile; a thread may hold a number for each of them
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
_LEAST_CHUNK_ROWS, _MOST_CHUNKS = 64, 2048
_WORKSPACE_ENTRIES = 1 << 21  # float64 partial sums of sum_rows


@triton.jit
def load_rows(row, start, alive, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr):
    """Load columns [start, start + BLOCK) of the rows [ROWS] of a tile as M; zeros beyond D."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    return tl.load(row[:, None] + columns, alive[:, None] & (columns < COLUMNS), other=0).to(M)


@triton.jit
def _store_rows(target, start, mask, y, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Store, rounded, columns [start, start + BLOCK) of the rows whose mask [ROWS] is set."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    if target.dtype.element_ty == tl.bfloat16:
        y = y.to(tl.float32)  # no hardware converts float64 to bfloat16
    y = y.to(target.dtype.element_ty)
    tl.store(target[:, None] + columns, y, mask[:, None] & (columns < COLUMNS))


@triton.jit
def _load_vector(vector, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr):
    """Load entries [start, start + BLOCK) of a vector [D] as [1, BLOCK] of M; zeros beyond D."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    return tl.load(vector + columns, columns < COLUMNS, other=0).to(M)


@triton.jit
def _over(y, lengths, INDEX: tl.constexpr, EXACT: tl.constexpr):
    """Return y over a length, if it is there; only EXACT survives lengths without reciprocal."""
    if INDEX < len(lengths):
        if EXACT:
            y /= lengths[INDEX][:, None]
        else:
            y *= (1 / lengths[INDEX]).to(y.dtype)[:, None]
    return y


@triton.jit
def image_block(
    row,  # [ROWS] pointers
    start,
    alive,  # [ROWS] false beyond the last row
    row_map,  # A, a number, or [D] or [D, D]; b [D]; h [D]: float64
    lengths,  # [ROWS] float64: peak, |x / peak|, |A u + b|, |unit(A u + b) + h|
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGE: tl.constexpr,
    DIMS: tl.constexpr = 0,  # of A
    EXACT: tl.constexpr = True,
    M: tl.constexpr = tl.float64,
):
    """Return a block of u (stage 0), unit(A u + b) (1) or unit(unit(A u + b) + h) (2), as M.

    A length that is not among ``lengths``, which may end early, leaves its division out.
    """
    linear, shift, recentre = row_map[0], row_map[1], row_map[2]
    if DIMS == 2 and STAGE >= 1:  # (the tile is one row)
        y = tl.zeros([1, BLOCK], M)
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        for first in range(0, COLUMNS, BLOCK):
            x = load_rows(row, first, alive, COLUMNS, BLOCK, M)
            deep = first + tl.arange(0, BLOCK)[None, :]
            mask = (column < COLUMNS) & (deep < COLUMNS)
            entries = tl.load(linear + column * COLUMNS + deep, mask, other=0)
            x = _over(_over(x, lengths, 0, EXACT), lengths, 1, EXACT)
            y += tl.sum(entries * x, axis=1)[None, :]
    else:
        x = load_rows(row, start, alive, COLUMNS, BLOCK, M)
        y = _over(_over(x, lengths, 0, EXACT), lengths, 1, EXACT)
        if STAGE >= 1 and DIMS == 1:
            y *= _load_vector(linear, start, COLUMNS, BLOCK, M)
        elif STAGE >= 1:
            y *= tl.load(linear).to(M)
    if STAGE >= 1:
        y = _over(y + _load_vector(shift, start, COLUMNS, BLOCK, M), lengths, 2, EXACT)
    if STAGE >= 2:
        y = _over(y + _load_vector(recentre, start, COLUMNS, BLOCK, M), lengths, 3, EXACT)
    return y


@triton.jit
def lengths_of_rows(
    row,
    image,  # [ROWS] pointers to A x where that is known; otherwise the rows
    alive,
    lengths,  # those that are known: the peak at least
    row_map,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    KINDS: tl.constexpr,  # number of lengths: 1 without a map, 2 with A and b, 3 with h
    DIMS: tl.constexpr = 0,
    EXACT: tl.constexpr = True,
    M: tl.constexpr = tl.float64,
):
    """Return the lengths of `image_block` (infinity instead of 0), and a mask of the usual rows.

    A row is usual if M can hold the squares, and if no sum ``y + c`` is shorter than half of c: a
    shorter one has lost digits to cancellation.
    """
    usual = alive
    limit: tl.constexpr = 1e30 if M == tl.float32 else 1e280
    for stage in tl.static_range(len(lengths) - 1, KINDS):
        squares = tl.zeros(alive.shape, tl.float64)
        added = tl.zeros([1], tl.float64)
        for start in range(0, COLUMNS, BLOCK):
            source = row if stage == 0 else image
            y = image_block(
                source, start, alive, row_map, lengths, COLUMNS, BLOCK, stage, DIMS, EXACT, M
            )
            squares += tl.sum(y * y, axis=1).to(tl.float64)
            if stage >= 1:
                c = _load_vector(row_map[stage], start, COLUMNS, BLOCK, M)
                added += tl.sum(c * c, axis=1).to(tl.float64)
        usual = usual & (squares > 1 / limit) & (squares < limit) & (squares > added / 4)
        lengths += (tl.where(squares > 0, tl.sqrt(squares), float("inf")),)
    return lengths, usual


@triton.jit
def kind_of_rows(row, alive, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest |entry| (1 if that is 0), and masks of zero and of finite rows; [ROWS]."""
    peak = tl.zeros(alive.shape, tl.float64)
    outside = tl.zeros(alive.shape, tl.int32)
    for start in range(0, COLUMNS, BLOCK):
        x = tl.abs(load_rows(row, start, alive, COLUMNS, BLOCK, tl.float64))
        finite = x < float("inf")
        peak = tl.maximum(peak, tl.max(tl.where(finite, x, 0), axis=1))
        outside = tl.maximum(outside, tl.max(tl.where(finite, 0, 1), axis=1))
    zero = (peak == 0) & (outside == 0)
    return tl.where(peak > 0, peak, 1), zero, outside == 0


@triton.jit
def write_images(
    target,  # [ROWS] pointers
    row,
    image,
    mask,  # [ROWS] the rows to write, if they are usual or if EXACT
    row_map,  # and the length [] float64, read if LENGTH = 2
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIMS: tl.constexpr,
    KINDS: tl.constexpr,
    LENGTH: tl.constexpr,  # 0 leaves the last normalisation out, 1 is unit rows, 2 another length
    EXACT: tl.constexpr,
    M: tl.constexpr,
):
    """Write the images of rows, non-finite rows as NaN, and return the mask of those left out.

    EXACT computes in float64, whatever M is.
    """
    DTYPE: tl.constexpr = tl.float64 if EXACT else M
    if EXACT:
        peak, _, finite = kind_of_rows(row, mask, COLUMNS, BLOCK)
    else:
        peak, finite = tl.full(mask.shape, 1, tl.float64), mask
    lengths, usual = lengths_of_rows(
        row, image, mask, (peak,), row_map, COLUMNS, BLOCK, KINDS, DIMS, EXACT, DTYPE
    )
    written = mask if EXACT else usual
    if LENGTH == 0:
        lengths = lengths[:KINDS]
    for start in range(0, COLUMNS, BLOCK):
        y = image_block(
            image, start, mask, row_map, lengths, COLUMNS, BLOCK, KINDS - 1, DIMS, EXACT, DTYPE
        )
        if LENGTH == 2:
            y *= tl.load(row_map[3]).to(DTYPE)
        if EXACT:
            y = tl.where(finite[:, None], y, float("nan"))
        _store_rows(target, start, written, y, COLUMNS, BLOCK)
    return mask & (written == 0)


@triton.jit(do_not_specialize=["row_count", "row_stride", "out_stride"])
def align_rows_kernel(
    rows,  # [N, D]
    row_count,
    row_stride,
    out,  # [N, D]
    out_stride,
    image,  # [N, WIDTH] M: A x over the factor, read if WIDTH > 0
    factor,  # [] float64
    linear,  # A [], [D] or [D, D] float64
    shift,  # b [D] float64
    recentre,  # h [D] float64, read if KINDS = 3
    result_length,  # [] float64, read if LENGTH = 2
    COLUMNS: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,  # divides row_stride
    OUT_STEP: tl.constexpr,  # divides out_stride
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,  # of A; a matrix is multiplied here only by rows that are unusual
    KINDS: tl.constexpr,
    LENGTH: tl.constexpr,
    M: tl.constexpr,  # dtype of the computation
):
    """Map one tile of rows, the unusual ones in float64; their products with a matrix are known."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    number = first + tl.arange(0, ROWS)
    row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
    target = out + tl.multiple_of(number * out_stride, OUT_STEP)
    row_map = linear, shift, recentre, result_length
    alive = number < row_count
    product, usual_map = row, row_map
    if WIDTH > 0:
        product, usual_map = image + number * WIDTH, (factor, shift, recentre, result_length)
    unusual = write_images(
        target, row, product, alive, usual_map, COLUMNS, BLOCK, DIMS * (WIDTH == 0), KINDS, LENGTH,
        False, M,
    )  # fmt: skip
    if tl.max(unusual.to(tl.int32), axis=0) > 0:
        if WIDTH == 0:
            write_images(
                target, row, row, unusual, row_map, COLUMNS, BLOCK, DIMS, KINDS, LENGTH, True, M
            )
        else:
            PART: tl.constexpr = 32 if BLOCK < 512 else 64  # (fits the registers of its warps)
            for offset in range(ROWS):
                some = first + offset + tl.arange(0, 1)
                mask = tl.max((unusual & (number == some)).to(tl.int32), axis=0, keep_dims=True) > 0
                x = rows + tl.multiple_of(some * row_stride, ROW_STEP)
                y = out + some * out_stride
                write_images(y, x, x, mask, row_map, COLUMNS, PART, DIMS, KINDS, LENGTH, True, M)


@triton.jit
def _gradient_block(
    row,  # [ROWS] pointers
    grad,  # [ROWS] pointers
    start,
    alive,
    row_map,  # and the length [] float64
    lengths,  # of `image_block`
    along,  # [ROWS] float64: for each step back, the component along the vector that has a length
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Return a block of the gradient after the steps to e + h, to s u + b and to the row."""
    y = load_rows(grad, start, alive, COLUMNS, BLOCK, tl.float64)
    if LENGTH == 2:
        y *= tl.load(row_map[3])
    for step in tl.static_range(len(along)):
        if 3 - step < len(lengths) and (step < 2 or NORMALIZE):
            unit = image_block(row, start, alive, row_map, lengths, COLUMNS, BLOCK, 2 - step)
            y = _over(y - unit * along[step][:, None], lengths, 3 - step, True)
        if step == 1:
            y *= tl.load(row_map[0])
    return _over(y, lengths, 0, True) if len(along) == 3 else y


@triton.jit
def _write_gradients_exactly(
    target,  # [ROWS] pointers
    row,
    grad,
    mask,  # [ROWS] the rows to write
    row_map,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    KINDS: tl.constexpr,
    LENGTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Write gradients in float64, each step with sweeps of its own; 0 for rows without one."""
    peak, _, lives = kind_of_rows(row, mask, COLUMNS, BLOCK)
    one = tl.full(mask.shape, 1, tl.float64)
    known = (peak,) if NORMALIZE else (one, one)
    MAPPED: tl.constexpr = KINDS if LENGTH > 0 else KINDS - 1
    lengths, _ = lengths_of_rows(row, row, mask, known, row_map, COLUMNS, BLOCK, MAPPED)
    for index in tl.static_range(1, len(lengths)):
        lives = lives & (lengths[index] < float("inf"))
    along = ()
    for step in tl.static_range(3):
        sums = tl.zeros(mask.shape, tl.float64)
        if 3 - step < len(lengths):
            for start in range(0, COLUMNS, BLOCK):
                unit = image_block(row, start, mask, row_map, lengths, COLUMNS, BLOCK, 2 - step)
                y = _gradient_block(
                    row, grad, start, mask, row_map, lengths, along, COLUMNS, BLOCK, LENGTH,
                    NORMALIZE,
                )  # fmt: skip
                sums += tl.sum(unit * y, axis=1)
        along += (sums,)  # type: ignore[assignment]
    for start in range(0, COLUMNS, BLOCK):
        y = _gradient_block(
            row, grad, start, mask, row_map, lengths, along, COLUMNS, BLOCK, LENGTH, NORMALIZE
        )
        _store_rows(target, start, mask, tl.where(lives[:, None], y, 0), COLUMNS, BLOCK)


@triton.jit(do_not_specialize=["row_count", "row_stride", "grad_stride"])
def align_rows_backward_kernel(
    rows,  # [N, D]
    row_count,
    row_stride,
    grad,  # [N, D]
    grad_stride,
    out,  # [N, D], contiguous, of the dtype of the rows
    scale,  # [] float64
    shift,  # b [D] float64
    recentre,  # h [D] float64, read if KINDS = 3
    result_length,  # [] float64, read if LENGTH = 2
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,
    GRAD_STEP: tl.constexpr,
    KINDS: tl.constexpr,
    LENGTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    M: tl.constexpr,
):
    """Write ``of_g g + alpha x + beta b + gamma h`` for one tile of rows, as row_map_math.h does.

    Rows for which M cannot hold the coefficients, or for which a norm cancels, are computed step
    by step.
    """
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
    gradient = grad + tl.multiple_of(number * grad_stride, GRAD_STEP)
    target = out + tl.multiple_of(number * COLUMNS, ROW_STEP)
    row_map = scale, shift, recentre, result_length
    alive = number < row_count
    xx = tl.zeros([ROWS], tl.float64)
    xb, xh, gx, gb, gh, gg = xx, xx, xx, xx, xx, xx
    bb = tl.zeros([1], tl.float64)
    bh, hh = bb, bb
    for start in range(0, COLUMNS, BLOCK):
        x = load_rows(row, start, alive, COLUMNS, BLOCK, M)
        g = load_rows(gradient, start, alive, COLUMNS, BLOCK, M)
        b = _load_vector(shift, start, COLUMNS, BLOCK, M)
        xx += tl.sum(x * x, axis=1).to(tl.float64)
        xb += tl.sum(x * b, axis=1).to(tl.float64)
        gx += tl.sum(g * x, axis=1).to(tl.float64)
        gb += tl.sum(g * b, axis=1).to(tl.float64)
        gg += tl.sum(g * g, axis=1).to(tl.float64)
        bb += tl.sum(b * b, axis=1).to(tl.float64)
        if KINDS == 3:
            h = _load_vector(recentre, start, COLUMNS, BLOCK, M)
            xh += tl.sum(x * h, axis=1).to(tl.float64)
            gh += tl.sum(g * h, axis=1).to(tl.float64)
            bh += tl.sum(b * h, axis=1).to(tl.float64)
            hh += tl.sum(h * h, axis=1).to(tl.float64)

    limit: tl.constexpr = 1e30 if M == tl.float32 else 1e280
    least: tl.constexpr = 1e-44 if M == tl.float32 else 1e-280
    fit = alive & (gg > 1 / limit) & (gg < limit) & (xx < limit)
    s = tl.load(scale)
    a = s + tl.zeros([ROWS], tl.float64)
    if NORMALIZE:
        fit = fit & (xx > 1 / limit)
        a = s / tl.sqrt(xx)
    k = tl.full([ROWS], 1, tl.float64)
    if LENGTH == 2:
        k = k * tl.load(result_length)
    of_g, of_b, of_h = k, k * 0, k * 0
    if KINDS == 3 or LENGTH > 0:
        aa = a * a * xx
        rr = aa + 2 * a * xb + bb
        fit = fit & (rr > 1 / limit) & (rr < limit) & (rr > (aa + bb) / 8)
        inverse_r = 1 / tl.sqrt(rr)
        eg = inverse_r * (a * gx + gb)
        eh = inverse_r * (a * xh + bh)
        if KINDS == 3 and LENGTH > 0:
            qq = 1 + 2 * eh + hh
            fit = fit & (qq > (1 + hh) / 8)
            k = k / tl.sqrt(qq)
            along_last = k * (eg + gh) / qq
            of_h = -inverse_r * along_last
            of_b = -inverse_r * inverse_r * (k * eg - along_last * eh)
        else:
            of_b = -inverse_r * inverse_r * (k * eg)
        of_g = inverse_r * k
    if NORMALIZE:
        alpha = -a * (of_g * gx + of_b * xb + of_h * xh) / xx
    else:
        alpha = a * a * of_b
    of_g, beta, gamma = a * of_g, a * of_b, a * of_h
    size = tl.maximum(tl.maximum(tl.abs(alpha), tl.abs(beta)), tl.abs(gamma))
    fit = fit & (size < limit) & (tl.abs(of_g) < limit) & (of_g * of_g * gg > least)

    of_g, alpha = of_g.to(M)[:, None], alpha.to(M)[:, None]
    beta, gamma = beta.to(M)[:, None], gamma.to(M)[:, None]
    for start in range(0, COLUMNS, BLOCK):
        x = load_rows(row, start, alive, COLUMNS, BLOCK, M)
        g = load_rows(gradient, start, alive, COLUMNS, BLOCK, M)
        y = alpha * x + beta * _load_vector(shift, start, COLUMNS, BLOCK, M)
        if KINDS == 3:
            y += gamma * _load_vector(recentre, start, COLUMNS, BLOCK, M)
        _store_rows(target, start, fit, of_g * g + y, COLUMNS, BLOCK)
    unusual = alive & (fit == 0)
    if tl.max(unusual.to(tl.int32), axis=0) > 0:
        _write_gradients_exactly(
            target, row, gradient, unusual, row_map, COLUMNS, BLOCK, KINDS, LENGTH, NORMALIZE
        )


@triton.jit(do_not_specialize=["row_count", "row_stride", "packed_rows", "program_rows"])
def sum_rows_kernel(
    rows,  # [N, D]
    row_count,
    row_stride,
    sums,  # [1 or 2, programs, WIDTH] float64: the sum; if TERMS > 0, that of low^2
    numbers,  # [programs, 4] float64: energy; rows, zero, non-finite rows
    scale,  # [] float64
    shift,  # b [D] float64
    recentre,  # h [D] float64
    centre,  # c [WIDTH] float64; it and the next three are read if TERMS > 0
    weights,  # [N] float64
    factor,  # [WIDTH] float64, powers of two
    packed,  # [TERMS, packed_rows, WIDTH] float16 or float64
    packed_rows,
    program_rows,  # a multiple of ROWS
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # D, or D rounded up to full tiles of the product
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,
    KINDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,  # 0 sums images x of rows, 1 and 2 pack sqrt(w) (x - c) and sum w (x - c)
    M: tl.constexpr,
):
    """Sum, and pack, one block of columns of program_rows rows."""
    own = tl.program_id(1) * BLOCK
    there = own + tl.arange(0, BLOCK)
    row_map = scale, shift, recentre
    unit_length = tl.full([ROWS], 1, tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    energy = tl.zeros([ROWS], tl.float64)
    counted = tl.zeros([ROWS], tl.int32)
    squares, zeros, outside = total, counted, counted
    if TERMS > 0:
        c = tl.load(centre + there, there < WIDTH, other=0)[None, :]
        power = tl.load(factor + there, there < WIDTH, other=1)[None, :]
    for offset in range(0, program_rows, ROWS):
        number = tl.program_id(0).to(tl.int64) * program_rows + offset + tl.arange(0, ROWS)
        alive = number < row_count
        row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
        root = alive.to(tl.float64)
        if WEIGHTED:
            root = tl.sqrt(tl.load(weights + number, alive, other=0))
        lengths, usual = lengths_of_rows(
            row, row, alive, (unit_length,), row_map, COLUMNS, BLOCK, KINDS, 0, False, M
        )
        square = unit_length
        if not NORMALIZE:
            square = lengths[1] * lengths[1]
            lengths = ()
        y = image_block(row, own, alive, row_map, lengths, COLUMNS, BLOCK, KINDS - 1, 0, False, M)
        if TERMS > 0:
            y = (y - c.to(M)) * root.to(M)[:, None] * power.to(M)
        y = tl.where(usual[:, None], y, 0)
        if TERMS == 0:
            total += tl.sum(y, axis=0).to(tl.float64)
        energy += tl.where(usual, square, 0)
        counted += usual.to(tl.int32)

        unusual = alive & (usual == 0)
        if tl.max(unusual.to(tl.int32), axis=0) > 0:
            peak, zero, finite = kind_of_rows(row, unusual, COLUMNS, BLOCK)
            some = unusual & finite
            lengths, _ = lengths_of_rows(row, row, some, (peak,), row_map, COLUMNS, BLOCK, KINDS)
            lives = lengths[KINDS] < float("inf")
            square = unit_length
            if not NORMALIZE:
                square = peak * lengths[1] * peak * lengths[1]
                lengths = ()
            exact = image_block(row, own, some, row_map, lengths, COLUMNS, BLOCK, KINDS - 1)
            if TERMS > 0:
                exact = (exact - c) * root[:, None] * power
                y = tl.where(some[:, None], exact.to(M), y)
            else:
                total += tl.sum(tl.where(some[:, None], exact, 0), axis=0)
            energy += tl.where(some & lives, square, 0)
            counted += some.to(tl.int32)
            zeros += (some & zero).to(tl.int32)
            outside += (unusual & (finite == 0)).to(tl.int32)

        if TERMS > 0:
            target = packed + number[:, None] * WIDTH + there[None, :]
            mask = (number < packed_rows)[:, None] & (there < WIDTH)[None, :]
            high = y.to(packed.dtype.element_ty)
            tl.store(target, high, mask)
            if TERMS == 2:
                low = (y - high.to(M)).to(packed.dtype.element_ty)
                tl.store(target + packed_rows.to(tl.int64) * WIDTH, low, mask)
                y = high.to(M) + low.to(M)
                squares += tl.sum(low.to(M) * low.to(M), axis=0).to(tl.float64)
            total += tl.sum(y * root.to(M)[:, None], axis=0).to(tl.float64)

    program = tl.program_id(0).to(tl.int64)
    sums += program * WIDTH + there
    tl.store(sums, total, there < WIDTH)
    if TERMS > 0:
        tl.store(sums + tl.num_programs(0).to(tl.int64) * WIDTH, squares, there < WIDTH)
    if own == 0:
        tl.store(numbers + program * 4, tl.sum(energy, axis=0))
        tl.store(numbers + program * 4 + 1, tl.sum(counted, axis=0).to(tl.float64))
        tl.store(numbers + program * 4 + 2, tl.sum(zeros, axis=0).to(tl.float64))
        tl.store(numbers + program * 4 + 3, tl.sum(outside, axis=0).to(tl.float64))


def tile(columns: int, crowded: bool = False) -> dict[str, int]:
    """Return ROWS, BLOCK and the number of warps for rows of D columns.

    A kernel with many numbers for each entry crowds the registers: its blocks are half as wide.
    """
    block = min(max(triton.next_power_of_2(columns), 64), _TILE_ENTRIES // (1 + crowded))
    rows = min(_TILE_ENTRIES // block, _MOST_ROWS)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(rows * block // _ENTRIES_OF_A_WARP, 1)}


def step_of(rows: Tensor) -> int:
    """Return the entries in 16 bytes if the bytes of a row are a multiple of 16, otherwise 1.

    Such rows are read 16 bytes at a time, others entry by entry.
    """
    step = 16 // rows.element_size()
    return 1 if rows.shape[1] % step else step


def aligned(rows: Tensor) -> Tensor:
    """Return the rows, copied if `step_of` does not divide their stride and their address.

    Reading them in other steps would make results depend on where a batch was cut.
    """
    step = step_of(rows)
    if step > 1 and (rows.data_ptr() % 16 or rows.stride(0) % step or rows.stride(1) != 1):
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def on_device_of(rows: Tensor) -> torch.cuda.device:
    """Return the context in which kernels for these rows are launched; a no-op for CPU rows."""
    return torch.cuda.device(rows.device if rows.is_cuda else -1)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    rows: Tensor,
    m: torch.dtype,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Run a kernel, which takes aligned rows, their number and stride first, and computes in m."""
    constants |= {"COLUMNS": rows.shape[1], "ROW_STEP": step_of(rows), "M": TRITON_DTYPE[m]}
    with on_device_of(rows):
        kernel[grid](rows, len(rows), rows.stride(0), *arguments, **constants)


def launch_map(
    target: Tensor,  # [N, D], aligned
    rows: Tensor,  # [N, D]
    m: torch.dtype,
    linear: Tensor,  # [] float64, or [D], a diagonal, or [D, D], whose product is given
    shift: Tensor,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    length: float | None,
    product: tuple[Tensor, Tensor] | None = None,  # A x over a factor, [N, WIDTH] M; the factor []
) -> None:
    """Write the images of the rows into the target with one read and one write of each row."""
    is_unit = length in (None, 1)
    shape = tile(rows.shape[1], linear.dim() == 1 and m == torch.float64)
    result_length = shift if is_unit else shift.new_full((), length or 0)
    vectors = linear, shift, shift if recentre is None else recentre, result_length
    launch(
        align_rows_kernel,
        (triton.cdiv(len(rows), shape["ROWS"]),),
        rows,
        m,
        *(target, target.stride(0), *(product or (linear, linear)), *vectors),
        OUT_STEP=step_of(target),
        WIDTH=product[0].shape[1] if product else 0,
        DIMS=linear.dim(),
        KINDS=2 if recentre is None else 3,
        LENGTH=0 if length is None else 1 if is_unit else 2,
        **shape,
    )


def align_rows_backward(
    rows: Tensor,  # [N, D]
    grad: Tensor,  # [N, D]
    linear: Tensor,  # [] float64
    shift: Tensor,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    length: float | None = 1.0,
    normalize: bool = True,
    variant: int = 0,
) -> Tensor:
    """Compute ``reference.align_rows_backward`` with one read of the rows and of the gradient."""
    m = torch.float64 if torch.float64 in (rows.dtype, grad.dtype) else torch.float32
    grad, out = aligned(grad), torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    is_unit = length in (None, 1)
    shape = tile(rows.shape[1], m == torch.float64)
    launch(
        align_rows_backward_kernel,
        (triton.cdiv(len(rows), shape["ROWS"]),),
        aligned(rows),
        m,
        *(grad, grad.stride(0), out, linear, shift, shift if recentre is None else recentre),
        shift if is_unit else shift.new_full((), length or 0),
        GRAD_STEP=step_of(grad),
        KINDS=2 if recentre is None else 3,
        LENGTH=0 if length is None else 1 if is_unit else 2,
        NORMALIZE=normalize,
        **shape,
    )
    return out


def launch_sums(
    rows: Tensor,
    m: torch.dtype,
    program_rows: int,
    vectors: Sequence[Tensor | None],
    packed: Tensor | None = None,
    *,
    normalize: bool,
    kinds: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run `sum_rows_kernel` on rows and return the totals of `sums` [2, WIDTH] and `numbers` [4].

    The vectors are those from `scale` to `factor`, None where they are not read.
    """
    padded_rows, width = rows.shape if packed is None else packed.shape[1:]
    terms = 0 if packed is None else len(packed)
    shape = tile(rows.shape[1], terms > 0 or rows.dtype == torch.float64)
    programs = triton.cdiv(padded_rows, program_rows)
    sums = torch.empty(2 if terms else 1, programs, width, dtype=torch.float64, device=rows.device)
    numbers = sums.new_empty(programs, 4)
    tensors = [*vectors, *[None] * (6 - len(vectors)), packed]
    launch(
        sum_rows_kernel,
        (programs, triton.cdiv(width, shape["BLOCK"])),
        aligned(rows),
        m,
        *(sums, numbers, *(sums if vector is None else vector for vector in tensors)),
        padded_rows,
        program_rows,
        WIDTH=width,
        KINDS=kinds,
        WEIGHTED=tensors[4] is not None,
        NORMALIZE=normalize,
        TERMS=terms,
        **shape,
    )
    return sums.sum(dim=1), numbers.sum(dim=0)


def sum_rows(
    rows: Tensor,  # [N, D]
    scale: Tensor | None,  # [] float64
    shift: Tensor | None,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    normalize: bool,
    variant: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``reference.sum_rows`` in chunks that depend on the shape alone, added in order."""
    count, columns = rows.shape
    most = min(_MOST_CHUNKS, max(_WORKSPACE_ENTRIES // columns, 1))
    step = triton.cdiv(max(triton.cdiv(count, most), _LEAST_CHUNK_ROWS), 64) * 64
    m = torch.float32 if normalize and rows.dtype != torch.float64 else torch.float64
    kinds = 1 + (shift is not None) + (recentre is not None)
    sums, numbers = launch_sums(
        rows, m, step, (scale, shift, recentre), normalize=normalize, kinds=kinds
    )
    return sums[0], numbers[0].clone(), numbers[1:].long()
