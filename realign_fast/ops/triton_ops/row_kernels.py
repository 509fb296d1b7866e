"""Triton kernels of ``align_rows`` and ``sum_rows``: one read of a row, and one write or none.

A program processes a tile of `ROWS` rows and `BLOCK` columns at a time; a row longer than BLOCK is
read block by block. As in ``csrc/common/row_map_math.h`` every norm in ``unit(unit(s u + b) + h)``
follows from the dot products x.x, x.b and x.h, so the result is ``alpha x + beta b + gamma h``.
Rows for which that sum cancels, and rows that are zero, non-finite or too large or small to square,
are *unusual*: the program recomputes them in float64, term by term (:func:`_lengths`).

Tiles, and therefore the order of every sum, depend on D and the dtypes alone: memory that is not
aligned to 16 bytes is copied first instead of being read in other steps. So a row has the same
bytes whatever rows surround it, and a sum has the same bytes in every run.

The kernels name their tensors as the formulas do: ``M`` is the dtype they compute in.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ENTRIES = {torch.float32: 4096, torch.float64: 2048}  # 32 or 16 for each of 128 threads
_CAREFUL_ENTRIES = 512  # of a tile in which unusual rows are recomputed
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
def store_rows(target, start, mask, y, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Store, rounded, columns [start, start + BLOCK) of the rows whose mask [ROWS] is set."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    if target.dtype.element_ty == tl.bfloat16:
        y = y.to(tl.float32)  # no hardware converts float64 to bfloat16
    y = y.to(target.dtype.element_ty)
    tl.store(target[:, None] + columns, y, mask[:, None] & (columns < COLUMNS))


@triton.jit
def load_vector(vector, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load entries [start, start + BLOCK) of b or h as [1, BLOCK]; zeros beyond D."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    return tl.load(vector + columns, columns < COLUMNS, other=0)


@triton.jit
def dot_rows(
    row,  # [ROWS] pointers
    alive,  # [ROWS] false beyond the last row
    shift,  # [D] M, read with KINDS >= 2
    recentre,  # [D] M, read with KINDS = 3
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KINDS: tl.constexpr,
    M: tl.constexpr,
):
    """Return x.x, x.b and x.h of each row, [ROWS] float64; a block of columns is summed in M."""
    xx = tl.zeros([ROWS], tl.float64)
    xb = tl.zeros([ROWS], tl.float64)
    xh = tl.zeros([ROWS], tl.float64)
    for start in range(0, COLUMNS, BLOCK):
        x = load_rows(row, start, alive, COLUMNS, BLOCK, M)
        xx += tl.sum(x * x, axis=1).to(tl.float64)
        if KINDS >= 2:
            b = load_vector(shift, start, COLUMNS, BLOCK)
            xb += tl.sum(x * b, axis=1).to(tl.float64)
        if KINDS >= 3:
            h = load_vector(recentre, start, COLUMNS, BLOCK)
            xh += tl.sum(x * h, axis=1).to(tl.float64)
    return xx, xb, xh


@triton.jit
def squarable(xx, M: tl.constexpr):
    """Return false where x.x is too large or too small for M, zero, or NaN."""
    limit: tl.constexpr = 1e30 if M == tl.float32 else 1e280
    return (xx > 1 / limit) & (xx < limit)


@triton.jit
def _coefficients(xx, xb, xh, constants, M: tl.constexpr):
    """Return alpha, beta and gamma [ROWS] float64, and false where the row is unusual.

    A squared norm below an eighth of its terms has lost too many digits to cancellation.
    """
    s, bb = tl.load(constants), tl.load(constants + 1)
    bh, hh = tl.load(constants + 2), tl.load(constants + 3)
    usual = squarable(xx, M)
    inverse = 1 / tl.sqrt(tl.where(usual, xx, 1))
    rr = s * s + 2 * s * inverse * xb + bb
    usual = usual & (rr > (s * s + bb) / 8)
    inverse_r = 1 / tl.sqrt(tl.where(usual, rr, 1))
    qq = 1 + 2 * (s * inverse * xh + bh) * inverse_r + hh
    usual = usual & (qq > (1 + hh) / 8)
    gamma = 1 / tl.sqrt(tl.where(usual, qq, 1))
    beta = gamma * inverse_r
    return beta * s * inverse, beta, gamma, usual


@triton.jit
def _image(x, b, h, s, peak, norm, half, STAGE: tl.constexpr):
    """Return a block of x / peak (stage 0), s u + b (1) or unit(s u + b) + h (2), in float64."""
    y = x / peak[:, None]
    if STAGE >= 1:
        y = s * (y / norm[:, None]) + b
    if STAGE >= 2:
        y = y / half[:, None] + h
    return y


@triton.jit
def _length(
    row,
    alive,
    shift,
    recentre,
    s,
    peak,
    norm,
    half,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Return the norm of the rows of `_image`, [ROWS] float64, 1 where it is 0."""
    squares = tl.zeros_like(peak)
    for start in range(0, COLUMNS, BLOCK):
        x = load_rows(row, start, alive, COLUMNS, BLOCK, tl.float64)
        b = load_vector(shift, start, COLUMNS, BLOCK)
        h = load_vector(recentre, start, COLUMNS, BLOCK)
        y = _image(x, b, h, s, peak, norm, half, STAGE)
        squares += tl.sum(y * y, axis=1)
    return tl.where(squares > 0, tl.sqrt(squares), 1), squares > 0


@triton.jit
def kind_of_rows(row, alive, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest |entry| (1 if that is 0), and masks of zero and of finite rows; [ROWS]."""
    peak = tl.zeros([ROWS], tl.float64)
    outside = tl.zeros([ROWS], tl.int32)
    for start in range(0, COLUMNS, BLOCK):
        x = tl.abs(load_rows(row, start, alive, COLUMNS, BLOCK, tl.float64))
        finite = x < float("inf")
        peak = tl.maximum(peak, tl.max(tl.where(finite, x, 0), axis=1))
        outside = tl.maximum(outside, tl.max(tl.where(finite, 0, 1), axis=1))
    zero = (peak == 0) & (outside == 0)
    return tl.where(peak > 0, peak, 1), zero, outside == 0


@triton.jit
def _lengths(
    row,
    unusual,  # [ROWS] mask of the rows to compute
    shift,  # [D] float64
    recentre,  # [D] float64
    s,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Return |x| as peak * norm, |s u + b|, |e' + h|, and masks: zero, finite, image is not 0."""
    peak, zero, finite = kind_of_rows(row, unusual, COLUMNS, ROWS, BLOCK)
    some = unusual & finite  # a NaN must not enter the sums below
    units = tl.full([ROWS], 1, tl.float64)
    norm, lives = _length(row, some, shift, recentre, s, peak, units, units, COLUMNS, BLOCK, 0)
    half, last = units, units
    if KINDS >= 2:
        half, lives = _length(row, some, shift, recentre, s, peak, norm, units, COLUMNS, BLOCK, 1)
    if KINDS >= 3:
        last, lives = _length(row, some, shift, recentre, s, peak, norm, half, COLUMNS, BLOCK, 2)
    return peak, norm, half, last, zero, finite, lives


@triton.jit(do_not_specialize=["row_count", "row_stride", "out_stride"])
def align_rows_kernel(
    out,  # [N, D]
    rows,  # [N, D]
    shift,  # b [D] M
    recentre,  # h [D] M
    wide_shift,  # b [D] float64
    wide_recentre,  # h [D] float64
    constants,  # [4] float64: s, b.b, b.h, h.h
    row_count,
    row_stride,
    out_stride,
    COLUMNS: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAREFUL_BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,  # divides row_stride
    OUT_STEP: tl.constexpr,  # divides out_stride
    KINDS: tl.constexpr,  # 3 with h, 2 without
    M: tl.constexpr,  # dtype of the computation
):
    """Map one tile of rows to ``alpha x + beta b + gamma h``, unusual rows term by term."""
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = number < row_count
    row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
    target = out + tl.multiple_of(number * out_stride, OUT_STEP)
    xx, xb, xh = dot_rows(row, alive, shift, recentre, COLUMNS, ROWS, BLOCK, KINDS, M)
    alpha, beta, gamma, usual = _coefficients(xx, xb, xh, constants, M)
    for start in range(0, COLUMNS, BLOCK):
        y = alpha.to(M)[:, None] * load_rows(row, start, alive, COLUMNS, BLOCK, M)
        y += beta.to(M)[:, None] * load_vector(shift, start, COLUMNS, BLOCK)
        if KINDS >= 3:
            y += gamma.to(M)[:, None] * load_vector(recentre, start, COLUMNS, BLOCK)
        store_rows(target, start, alive & usual, y, COLUMNS, BLOCK)

    unusual = alive & (usual == 0)
    if tl.max(unusual.to(tl.int32), axis=0) > 0:
        s = tl.load(constants)
        peak, norm, half, last, _, finite, _ = _lengths(
            row, unusual, wide_shift, wide_recentre, s, COLUMNS, ROWS, CAREFUL_BLOCK, KINDS
        )
        for start in range(0, COLUMNS, CAREFUL_BLOCK):
            x = load_rows(row, start, unusual, COLUMNS, CAREFUL_BLOCK, tl.float64)
            b = load_vector(wide_shift, start, COLUMNS, CAREFUL_BLOCK)
            h = load_vector(wide_recentre, start, COLUMNS, CAREFUL_BLOCK)
            y = _image(x, b, h, s, peak, norm, half, KINDS - 1)
            y = y / (last if KINDS >= 3 else half)[:, None]
            y = tl.where(finite[:, None], y, float("nan"))
            store_rows(target, start, unusual, y, COLUMNS, CAREFUL_BLOCK)


@triton.jit(do_not_specialize=["row_count", "row_stride", "chunk_rows"])
def sum_rows_kernel(
    totals,  # [chunks, D] float64: sum of alpha x and of the images of unusual rows
    numbers,  # [chunks, 6] float64: energy, sum of beta, of gamma; rows, zero, non-finite rows
    rows,  # [N, D]
    shift,  # b [D] M
    recentre,  # h [D] M
    wide_shift,  # b [D] float64
    wide_recentre,  # h [D] float64
    constants,  # [4] float64
    row_count,
    row_stride,
    chunk_rows,  # a multiple of ROWS
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAREFUL_BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,
    KINDS: tl.constexpr,  # 1 without a map, 2 with s and b, 3 with h
    NORMALIZE: tl.constexpr,
    M: tl.constexpr,
):
    """Sum one block of columns of one chunk of rows."""
    first = tl.program_id(0).to(tl.int64) * chunk_rows
    own = tl.program_id(1) * BLOCK
    s = tl.load(constants)
    total = tl.zeros([BLOCK], tl.float64)
    energy = tl.zeros([ROWS], tl.float64)
    betas = tl.zeros([ROWS], tl.float64)
    gammas = tl.zeros([ROWS], tl.float64)
    counted = tl.zeros([ROWS], tl.int32)
    zeros = tl.zeros([ROWS], tl.int32)
    outside = tl.zeros([ROWS], tl.int32)
    careful = 0  # number of tiles with unusual rows, whose sums are collected in `totals`
    target = totals + tl.program_id(0).to(tl.int64) * COLUMNS
    for offset in range(0, chunk_rows, ROWS):
        number = first + offset + tl.arange(0, ROWS)
        alive = number < row_count
        row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
        xx, xb, xh = dot_rows(row, alive, shift, recentre, COLUMNS, ROWS, BLOCK, KINDS, M)
        if KINDS >= 2:
            alpha, beta, gamma, usual = _coefficients(xx, xb, xh, constants, M)
        else:
            usual = squarable(xx, M)
            beta, gamma = xb, xh
            alpha = 1 / tl.sqrt(tl.where(usual, xx, 1)) if NORMALIZE else xx * 0 + 1
        usual = alive & usual
        x = load_rows(row, own, alive, COLUMNS, BLOCK, M)
        part = tl.where(usual[:, None], alpha.to(M)[:, None] * x, 0)
        total += tl.sum(part, axis=0).to(tl.float64)
        energy += tl.where(usual, 1.0 if NORMALIZE else xx, 0)
        betas += tl.where(usual, beta, 0)
        gammas += tl.where(usual, gamma, 0)
        counted += usual.to(tl.int32)

        unusual = alive & (usual == 0)
        if tl.max(unusual.to(tl.int32), axis=0) > 0:
            peak, norm, half, last, zero, finite, lives = _lengths(
                row, unusual, wide_shift, wide_recentre, s, COLUMNS, ROWS, CAREFUL_BLOCK, KINDS
            )
            some = unusual & finite
            for start in range(own, own + BLOCK, CAREFUL_BLOCK):
                y = load_rows(row, start, some, COLUMNS, CAREFUL_BLOCK, tl.float64)
                if NORMALIZE:
                    b = load_vector(wide_shift, start, COLUMNS, CAREFUL_BLOCK)
                    h = load_vector(wide_recentre, start, COLUMNS, CAREFUL_BLOCK)
                    y = _image(y, b, h, s, peak, norm, half, KINDS - 1)
                    y = y / (norm if KINDS == 1 else half if KINDS == 2 else last)[:, None]
                added = tl.sum(tl.where(some[:, None], y, 0), axis=0)
                there = start + tl.arange(0, CAREFUL_BLOCK)
                before = tl.load(target + there, (there < COLUMNS) & (careful > 0), other=0)
                tl.store(target + there, before + added, there < COLUMNS)
            square = peak * norm * peak * norm
            energy += tl.where(some & lives, 1.0 if NORMALIZE else square, 0)
            careful += 1
            counted += some.to(tl.int32)
            zeros += (some & zero).to(tl.int32)
            outside += (unusual & (finite == 0)).to(tl.int32)

    columns = own + tl.arange(0, BLOCK)
    tl.debug_barrier()  # other threads of this program wrote the values that are read here
    total += tl.load(target + columns, (columns < COLUMNS) & (careful > 0), other=0)
    tl.store(target + columns, total, columns < COLUMNS)
    chunk = tl.program_id(0).to(tl.int64)
    if own == 0:
        tl.store(numbers + chunk * 6, tl.sum(energy, axis=0))
        tl.store(numbers + chunk * 6 + 1, tl.sum(betas, axis=0))
        tl.store(numbers + chunk * 6 + 2, tl.sum(gammas, axis=0))
        tl.store(numbers + chunk * 6 + 3, tl.sum(counted, axis=0).to(tl.float64))
        tl.store(numbers + chunk * 6 + 4, tl.sum(zeros, axis=0).to(tl.float64))
        tl.store(numbers + chunk * 6 + 5, tl.sum(outside, axis=0).to(tl.float64))


def tile(columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Return ROWS, BLOCK, CAREFUL_BLOCK and warps for rows of D columns computed in ``dtype``."""
    entries = _TILE_ENTRIES[dtype]
    block = min(max(triton.next_power_of_2(columns), 64), entries)
    rows = min(entries // block, _MOST_ROWS)
    return {
        "COLUMNS": columns,
        "ROWS": rows,
        "BLOCK": block,
        "CAREFUL_BLOCK": min(_CAREFUL_ENTRIES // rows, block),
        "num_warps": max(4 * rows * block // entries, 1),
    }


def aligned(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows, copied if their memory is not aligned, and a divisor of their stride.

    Rows whose bytes are a multiple of 16 are read 16 bytes at a time, others entry by entry. The
    choice must not depend on where a batch was cut.
    """
    step = 16 // rows.element_size()
    if rows.shape[1] % step:
        return rows, 1
    if rows.data_ptr() % 16 or rows.stride(0) % step or rows.stride(1) != 1:
        return rows.clone(memory_format=torch.contiguous_format), step
    return rows, step


def check_no_overlap(op: str, out: Tensor, rows: Tensor) -> None:
    """Raise if ``out`` overlaps itself, or overlaps the rows without being exactly the rows."""
    if len(out) > 1 and out.stride(0) < out.shape[1]:
        raise RuntimeError(f"{op}: the rows of out overlap one another; give out memory of its own")
    spans = []
    for tensor in (out, rows):
        last = (len(tensor) - 1) * tensor.stride(0) + tensor.shape[1] if len(tensor) else 0
        spans.append((tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()))
    (out_start, out_end), (rows_start, rows_end) = spans
    same_layout = out.stride(0) == rows.stride(0) and out.dtype == rows.dtype
    in_place = out_start == rows_start and same_layout
    if not in_place and out_end > rows_start and rows_end > out_start:
        raise RuntimeError(
            f"{op}: out overlaps the rows; give out memory of its own, or the rows themselves"
        )


def on_device_of(rows: Tensor) -> torch.cuda.device:
    """Return the context in which kernels for these rows are launched; a no-op for CPU rows."""
    return torch.cuda.device(rows.device if rows.is_cuda else -1)


def _map_vectors(
    scale: Tensor, shift: Tensor, recentre: Tensor | None, m: torch.dtype
) -> tuple[Tensor, ...]:
    """Return b and h as M, both as float64, and s, b.b, b.h, h.h, in the order of the kernels."""
    b, h = shift, shift if recentre is None else recentre
    wide = torch.stack([b, h])
    # An index such as wide[[0, 0, 1]] is a CPU tensor; copying it would wait for the GPU.
    products = (torch.stack([b, b, h]) * torch.stack([b, h, h])).sum(dim=1)
    if recentre is None:
        products[1:].zero_()
    narrow = wide.to(m, copy=True)
    constants = torch.cat([scale.reshape(1), products])
    return narrow[0], narrow[1].clone(), wide[0], wide[1].clone(), constants


def align_rows_(
    out: Tensor,  # [N, D]
    rows: Tensor,  # [N, D]
    scale: Tensor,  # [] float64
    shift: Tensor,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    variant: int = 0,
) -> None:
    """Compute ``reference.align_rows_`` with one read and one write of each row."""
    check_no_overlap("align_rows", out, rows)
    count, columns = rows.shape
    if count == 0:
        return
    wide = torch.float64 in (rows.dtype, out.dtype) or out.dtype == torch.bfloat16
    m = torch.float64 if wide else torch.float32  # csrc/common/dispatch.h gives the reasons
    source, row_step = aligned(rows)
    target, out_step = aligned(out)
    shape = tile(columns, m)
    with on_device_of(rows):
        align_rows_kernel[(triton.cdiv(count, shape["ROWS"]),)](
            target,
            source,
            *_map_vectors(scale, shift, recentre, m),
            count,
            source.stride(0),
            target.stride(0),
            ROW_STEP=row_step,
            OUT_STEP=out_step,
            KINDS=2 if recentre is None else 3,
            M=TRITON_DTYPE[m],
            **shape,
        )
    if target is not out:
        out.copy_(target)


def align_rows(
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    dtype: torch.dtype,
    variant: int = 0,
) -> Tensor:
    """Compute ``reference.align_rows`` as [N, D] of ``dtype``."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    align_rows_(out, rows, scale, shift, recentre)
    return out


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
    options: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
    if count == 0:
        counts = torch.zeros(3, **options).long()
        return torch.zeros(columns, **options), torch.zeros((), **options), counts
    m = torch.float32 if normalize and rows.dtype != torch.float64 else torch.float64
    shape = tile(columns, m)
    most = min(_MOST_CHUNKS, max(_WORKSPACE_ENTRIES // columns, 1))
    step = triton.cdiv(max(triton.cdiv(count, most), _LEAST_CHUNK_ROWS), 64) * 64
    chunks = triton.cdiv(count, step)
    totals, numbers = torch.empty(chunks, columns, **options), torch.empty(chunks, 6, **options)
    source, row_step = aligned(rows)
    vectors: tuple[Tensor, ...] = (torch.zeros(columns, **options),) * 5
    if scale is not None and shift is not None:
        vectors = _map_vectors(scale, shift, recentre, m)
    with on_device_of(rows):
        sum_rows_kernel[(chunks, triton.cdiv(columns, shape["BLOCK"]))](
            totals,
            numbers,
            source,
            *vectors,
            count,
            source.stride(0),
            step,
            ROW_STEP=row_step,
            KINDS=1 if shift is None else 2 if recentre is None else 3,
            NORMALIZE=normalize,
            M=TRITON_DTYPE[m],
            **shape,
        )
    total, sums = totals.sum(dim=0), numbers.sum(dim=0)
    if shift is not None:
        total += sums[1] * shift
    if recentre is not None:
        total += sums[2] * recentre
    return total, sums[0].clone(), sums[3:].long()
