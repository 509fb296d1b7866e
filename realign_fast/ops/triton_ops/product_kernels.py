"""Triton kernels with products on tensor cores: ``map_rows`` of a matrix, and ``add_scatter_``.

``map_rows`` multiplies a block of rows by A: float16 rows as they are, with A split into two
float16 matrices ``high + low``; bfloat16 and float32 rows in float32 precision (three TF32 products
on NVIDIA, the GPU's own float32 products elsewhere). TF32 alone, which is Triton's default, keeps
three digits. ``align_rows_kernel`` (``row_kernels.py``) then finishes the block, its *unusual* rows
from the beginning and in float64. A number or a diagonal needs no product.

``add_scatter_`` packs a chunk of rows (``sum_rows_kernel``): ``sqrt(w) (u - c)``, scaled by a power
of two for each column, is split into two float16 numbers ``high + low``. A second kernel multiplies
tiles of the upper triangle, split over the rows as well, ``high high + high low + low high``. A
third adds the splits to the result in float64, in their order. The omitted ``low low`` matters on
the diagonal alone, where it does not average out, and is added there.

Tensor cores truncate instead of rounding, so a new sum starts every 1024 terms. If the rows or the
result are float64, or with ``accurate=True``, everything is float64, and nothing is split. No
launch waits for the GPU, and the launches depend on shapes and dtypes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import check_no_overlap
from .row_kernels import TRITON_DTYPE, aligned, launch, launch_map, launch_sums, on_device_of

_PROMOTE = 1024  # summed on tensor cores before the sum is added to a rounded one
_MAP_ENTRIES = 1 << 23  # of A u that are computed at a time, so that they stay in the L2 cache
_PACK_ROWS = 32  # that a program packs
_DEPTH = 64  # the number of packed rows is a multiple of it
_CHUNK_ENTRIES = 1 << 24  # of a packed term: 32 MiB in float16
_PROGRAMS = 512  # enough to keep a GPU busy


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


@triton.jit(do_not_specialize=["packed_rows", "split_rows"])
def multiply_packed_kernel(
    parts,  # [splits, tiles, TILE, TILE] SUM: product of a split of the rows
    packed,  # [TERMS, packed_rows, WIDTH]
    pairs,  # [2, tiles] int64: the two tiles of columns that are multiplied
    packed_rows,  # a multiple of DEPTH
    split_rows,  # a multiple of PROMOTE
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PROMOTE: tl.constexpr,
    TERMS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Multiply two tiles of columns over one split of the rows."""
    tiles = tl.num_programs(0)
    row_columns = tl.load(pairs + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    columns = tl.load(pairs + tiles + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    row_columns, columns = tl.multiple_of(row_columns, TILE), tl.multiple_of(columns, TILE)
    low = packed_rows.to(tl.int64) * WIDTH
    first = tl.program_id(1) * split_rows
    end = tl.minimum(first + split_rows, packed_rows)
    total = tl.zeros([TILE, TILE], SUM)
    for group in range(first, end, PROMOTE):
        part = tl.zeros([TILE, TILE], SUM)
        for row in range(group, tl.minimum(group + PROMOTE, end), DEPTH):
            deep = (row + tl.arange(0, DEPTH)).to(tl.int64) * WIDTH
            a_entry = packed + deep[None, :] + row_columns[:, None]
            b_entry = packed + deep[:, None] + columns[None, :]
            a, b = tl.load(a_entry), tl.load(b_entry)
            part = tl.dot(a, b, part, input_precision="ieee")
            if TERMS == 2:
                part = tl.dot(a, tl.load(b_entry + low), part)
                part = tl.dot(tl.load(a_entry + low), b, part)
        total += part
    entry = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    slot = tl.program_id(1).to(tl.int64) * tiles + tl.program_id(0)
    tl.store(parts + slot * (TILE * TILE) + entry, total)


@triton.jit(do_not_specialize=["splits"])
def add_parts_kernel(
    scatter,  # [D, D] float64; only its upper triangle is read and written
    parts,  # [splits, tiles, TILE, TILE]
    pairs,  # [2, tiles] int64
    unscale,  # [WIDTH] float64
    splits,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the splits of ROWS rows of a tile to the result, in order."""
    tiles = tl.num_programs(0)
    line = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    entry = line[:, None] * TILE + tl.arange(0, TILE)[None, :]
    sums = tl.zeros([ROWS, TILE], tl.float64)
    for split in range(0, splits):
        slot = (split * tiles).to(tl.int64) + tl.program_id(0)
        sums += tl.load(parts + slot * (TILE * TILE) + entry).to(tl.float64)
    row = tl.load(pairs + tl.program_id(0)) * TILE + line
    column = tl.load(pairs + tiles + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    sums = sums * tl.load(unscale + row)[:, None] * tl.load(unscale + column)[None, :]
    mask = (row[:, None] <= column[None, :]) & (column < COLUMNS)[None, :]
    target = scatter + row[:, None] * COLUMNS + column[None, :]
    tl.store(target, tl.load(target, mask, other=0) + sums, mask)


def map_rows_(
    out: Tensor,  # [N, D]
    rows: Tensor,  # [N, D]
    linear: Tensor,  # A, float64: [], [D] or [D, D]
    shift: Tensor,  # [D] float64
    recentre: Tensor | None,  # [D] float64
    length: float | None = 1.0,
    variant: int = 0,
) -> None:
    """Compute ``reference.map_rows_``, a matrix block by block in 64 to 128 MiB of memory."""
    check_no_overlap("map_rows" if linear.dim() else "align_rows", out, rows)
    wide = torch.float64 in (rows.dtype, out.dtype)
    wide |= linear.dim() == 0 and out.dtype == torch.bfloat16  # (as in csrc/common/dispatch.h)
    m = torch.float64 if wide else torch.float32
    source, target, row_map = aligned(rows), aligned(out), (linear, shift, recentre, length)
    if linear.dim() < 2:
        launch_map(target, source, m, *row_map)
    else:
        in_place = target.data_ptr() == source.data_ptr()
        factor, pieces = _matrix_terms(linear, rows.dtype, m)
        count = max(_MAP_ENTRIES // rows.shape[1], 128)
        for block, into in zip(source.split(count), target.split(count), strict=True):
            product = _multiply(block, pieces, m), factor
            # An unusual row is read to the end for each of its blocks.
            launch_map(into, block.clone() if in_place else block, m, *row_map, product)
    if target is not out:
        out.copy_(target)


def map_rows(rows: Tensor, *row_map_and_dtype: Any) -> Tensor:
    """Compute ``reference.map_rows`` by :func:`map_rows_`, with its arguments in this order."""
    linear, shift, recentre, dtype, *options = row_map_and_dtype
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    map_rows_(out, rows, linear, shift, recentre, *options)
    return out


def product_tile(side: int, dtype: torch.dtype, depth: int = 32) -> dict[str, int]:
    """Return TILE, DEPTH, warps and stages; operands of 3 stages fit 99 KiB of shared memory."""
    depth = 16 if dtype == torch.float64 else depth
    return {"TILE": side, "DEPTH": depth, "num_warps": 8 if side == 128 else 4, "num_stages": 3}


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
    shape = product_tile(128 if terms == 2 and columns > 64 else 64, m)
    launch(
        multiply_rows_kernel,
        (triton.cdiv(columns, shape["TILE"]), triton.cdiv(count, shape["TILE"])),
        rows,
        m,
        product,
        pieces,
        WIDTH=width,
        PROMOTE=_PROMOTE,
        TERMS=terms,
        PRECISION="tf32x3" if pieces.dtype == torch.float32 and not torch.version.hip else "ieee",
        **shape,
    )
    return product


def _power_above(values: Tensor) -> Tensor:
    """Return the powers of two above the values, float64; 1 where a value is 0."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent)


def _column_scale(largest: Tensor) -> Tensor:
    """Return the powers of two, held by float32, that scale columns to the end of float16."""
    return (2.0**15 / _power_above(largest)).clamp(2.0**-120, 2.0**120)


def add_scatter_(
    scatter: Tensor,  # [D, D] float64; only its upper triangle is read and written
    total: Tensor,  # [D] float64
    rows: Tensor,  # [N, D]
    centre: Tensor,  # [D] float64
    weights: Tensor | None,  # [N] float64
    normalize: bool,
    accurate: bool,
    variant: int = 0,
) -> Tensor:
    """Compute ``reference.add_scatter_`` in one read of the rows (two with ``normalize=False``)."""
    count, columns = rows.shape
    wide = accurate or rows.dtype == torch.float64
    side = 64 if wide or columns <= 64 else 128
    width = triton.cdiv(columns, side) * side
    m, dtype = (torch.float64,) * 2 if wide else (torch.float32, torch.float16)
    c = torch.nn.functional.pad(centre, (0, width - columns))
    counts = torch.zeros(3, dtype=torch.int64, device=rows.device)
    scale, unit = torch.ones_like(c), c.new_ones(())
    if weights is not None and not wide and count:
        unit = _power_above(weights.amax().sqrt())
        weights = weights / unit / unit  # float32 holds the roots of few float64 weights
    if not wide and normalize:
        scale = _column_scale(1 + c.abs())
    pairs = torch.triu_indices(width // side, width // side, device=rows.device)
    chunk_rows = max(_CHUNK_ENTRIES // width // _PROMOTE, 1) * _PROMOTE
    source = aligned(rows)
    for first in range(0, count, chunk_rows):
        chunk = source[first : first + chunk_rows]
        w = None if weights is None else weights[first : first + chunk_rows]
        if not wide and not normalize:
            differences = torch.where(chunk.isfinite().all(1, True), chunk.double() - centre, 0)
            if w is not None:
                differences *= w.sqrt()[:, None]
            scale[:columns] = _column_scale(differences.abs().amax(dim=0))
        packed_rows = triton.cdiv(len(chunk), _DEPTH) * _DEPTH
        packed = torch.empty(1 if wide else 2, packed_rows, width, dtype=dtype, device=rows.device)
        vectors = None, None, None, c, w, scale
        sums, numbers = launch_sums(chunk, m, _PACK_ROWS, vectors, packed, normalize=normalize)
        added = sums / torch.stack([scale, scale * scale]) * (unit * unit)
        total += added[0, :columns]
        counts += numbers[1:].long()
        with on_device_of(rows):
            _add_tiles(scatter, packed, pairs, unit / scale, side)
        scatter.diagonal().add_(added[1, :columns])
    return counts


def _add_tiles(scatter: Tensor, packed: Tensor, pairs: Tensor, unscale: Tensor, side: int) -> None:
    """Add the unscaled product ``packed^T packed`` to the upper triangle of ``scatter``."""
    terms, packed_rows, width = packed.shape
    tiles = pairs.shape[1]
    groups = triton.cdiv(packed_rows, _PROMOTE)
    splits = triton.cdiv(groups, triton.cdiv(groups, triton.cdiv(_PROGRAMS, tiles)))
    split_rows = triton.cdiv(groups, splits) * _PROMOTE
    sum_dtype = torch.float32 if terms == 2 else torch.float64
    # sm_80 to 89 and sm_120 multiply from registers, which hold no deeper operands of such tiles.
    wants_registers = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (8, 12)
    parts = torch.empty(splits, tiles, side, side, dtype=sum_dtype, device=packed.device)
    multiply_packed_kernel[(tiles, splits)](
        parts,
        packed,
        pairs,
        packed_rows,
        split_rows,
        WIDTH=width,
        PROMOTE=_PROMOTE,
        TERMS=terms,
        SUM=TRITON_DTYPE[sum_dtype],
        **product_tile(side, sum_dtype, 64 if side < 128 else 16 if wants_registers else 32),
    )
    add_parts_kernel[(tiles, side // 16)](
        scatter, parts, pairs, unscale, splits, COLUMNS=len(scatter), TILE=side, ROWS=16
    )
